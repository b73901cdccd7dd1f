"""One case: an op, a sample and a dtype, with its references computed once; and its judgement.

    case = Case(spec, sample, torch.bfloat16)
    raise_if_wrong(case.judge(case.outputs(backend="cpu")))
    raise_if_wrong(case.judge_gradients(case.gradients(backend="cpu")))

Inputs stand between NaN guard zones and uninitialised memory is NaN, so that a read or write
outside a tensor and an element that was never written show (see `vitfast.testing.poison`). What is
right is decided by `vitfast.testing.errors`. A tag `zero:<name>` on a sample says that the gradient
of this argument (or the output `out<i>`) is zero but for rounding, and `empty` that all are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from vitfast.ops.spec import OpSpec, Sample
from vitfast.testing.errors import ErrorReport, compare
from vitfast.testing.inputs import OpCall, materialise
from vitfast.testing.poison import Guarded, guard_all, poisoned_memory

CONSTANT = frozenset({"drop_scale", "mean", "std"})
"""Floating arguments that ops declare not differentiable."""
NOT_TRAINED = frozenset({"mask", "rope"})
"""Floating arguments that few models train; a backend may leave their gradients to others."""


@dataclass(eq=False)
class Case:
    """References are computed on first use and kept as long as the case."""

    spec: OpSpec
    sample: Sample
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.spec.name}-{self.sample.name}-{dtype}"

    @cached_property
    def call(self) -> OpCall:
        return materialise(self.spec, self.sample, self.dtype)

    @cached_property
    def reference(self) -> tuple[torch.Tensor, ...]:
        """Outputs of the reference in float64."""
        with torch.no_grad():
            return self.call.float64().run(self.spec.reference)

    @cached_property
    def base(self) -> tuple[torch.Tensor, ...]:
        """Outputs of the reference in the working dtype."""
        with torch.no_grad():
            return self.call.run(self.spec.reference)

    @cached_property
    def output_grads(self) -> tuple[torch.Tensor, ...]:
        return self.call.output_grads(self.base)

    @cached_property
    def reference_gradients(self) -> dict[str, torch.Tensor | None]:
        return self.call.float64().gradients(
            self.spec.reference, self.output_grads, names=self.differentiable
        )

    @cached_property
    def base_gradients(self) -> dict[str, torch.Tensor | None]:
        return self.call.gradients(
            self.spec.reference, self.output_grads, names=self.differentiable
        )

    @property
    def differentiable(self) -> list[str]:
        return [n for n in self.call.floating() if n not in CONSTANT]

    @property
    def trained(self) -> list[str]:
        """The differentiable arguments that models train or pass gradients through."""
        return [n for n in self.differentiable if n not in NOT_TRAINED]

    def outputs(self, call: OpCall | None = None, **options: Any) -> tuple[torch.Tensor, ...]:
        """The public function's outputs, with guards around inputs and poisoned memory.

        Args:
            call: a variant of the case's call with the same values.
            options: passed to the public function, e.g. backend="cpu".

        Raises:
            AssertionError: an input was written, or memory outside an input or an allocation.
        """
        with _guarded(self.call if call is None else call) as guarded, torch.no_grad():
            return guarded.run(self.spec.public, **options)

    def gradients(
        self, names: Sequence[str] | None = None, call: OpCall | None = None, **options: Any
    ) -> dict[str, torch.Tensor | None]:
        """As `outputs`, but the gradients for these arguments (`differentiable` by default)."""
        names = self.differentiable if names is None else names
        call = self.call if call is None else call
        device = next(t for _, t in call.tensors()).device
        grads = [g.to(device) for g in self.output_grads]
        with _guarded(call) as guarded:
            return guarded.gradients(self.spec.public, grads, names=names, **options)

    def judge(self, outputs: Sequence[torch.Tensor], label: str = "auto") -> list[ErrorReport]:
        """Reports on outputs of a forward call; `label` (the backend, say) goes into messages."""
        spec = self.spec
        return [
            compare(
                t,
                r,
                b,
                name=f"{self} ({label}) out{i}",
                factor=spec.forward_factor,
                rms_factor=spec.rms_factor,
                working=self.dtype,
                zero=self._zero(f"out{i}"),
            )
            for i, (t, r, b) in enumerate(zip(outputs, self.reference, self.base, strict=True))
        ]

    def judge_gradients(
        self, gradients: dict[str, torch.Tensor | None], label: str = "auto"
    ) -> list[ErrorReport]:
        """Reports on gradients by argument name.

        Raises:
            AssertionError: the reference has a gradient where None came, or the other way round.
        """
        spec, reports = self.spec, []
        for name, t in gradients.items():
            r, b = self.reference_gradients[name], self.base_gradients[name]
            if t is None or r is None or b is None:
                assert t is None and r is None, (
                    f"{self} ({label}): {name} has {'no' if t is None else 'a'} gradient, "
                    f"the reference has {'none' if r is None else 'one'}"
                )
                continue
            reports.append(
                compare(
                    t,
                    r,
                    b,
                    name=f"{self} ({label}) gradient of {name}",
                    factor=spec.backward_factor,
                    rms_factor=spec.rms_factor,
                    working=self.dtype,
                    zero=self._zero(name),
                )
            )
        return reports

    def _zero(self, name: str) -> bool:
        return not self.sample.tags.isdisjoint({"empty", f"zero:{name}"})


@contextlib.contextmanager
def _guarded(call: OpCall) -> Iterator[OpCall]:
    guards: list[Guarded] = []
    arguments = guard_all(call.arguments, guards)
    with poisoned_memory():
        yield OpCall(call.signature, arguments, call.names)
    for guarded in guards:
        guarded.check()
