"""Judging one problem on the kernels of one backend: the verdict's state and reason.

It runs between guard zones in poisoned memory (`vitfast.testing.poison`), three times with the same
bits, and is compared with the reference in float64 (`vitfast.testing.errors`), which torch's own
kernels compute on the same device; the comparison itself is made on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from vitfast.errors import BackendUnavailableError, first_line
from vitfast.ops import spec_of
from vitfast.runtime.triton import is_launch_failure
from vitfast.runtime.verdicts import FAILED, RIGHT, WRONG
from vitfast.selftest.problems import Problem
from vitfast.testing.cases import Case
from vitfast.testing.errors import same_bits
from vitfast.testing.inputs import OpCall, materialise

REPEATS = 3
"""Calls whose results must have the same bits."""
REFUSED, NO_MEMORY = "refused", "no memory"
"""Answers that are no verdicts: the backend has a reason against this problem; there is no room for
it beside what else the device does."""


@dataclass(frozen=True)
class Answer:
    """What became of one problem.

    Args:
        state: `RIGHT`, `WRONG`, `FAILED`, `REFUSED` or `NO_MEMORY`.
        reason: why, for all states but `RIGHT`.
        error_over_budget: the worst of all outputs or gradients, 1 is the limit; None where nothing
            was compared.
        broken: whether the process that answers can do nothing more on the device.
    """

    state: str
    reason: str = ""
    error_over_budget: float | None = None
    broken: bool = False


class _Case(Case):
    """A case on a device, its references included; under autocast where the problem was."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        spec = spec_of(problem.op)
        super().__init__(spec, problem.as_sample(), getattr(torch, problem.dtype))
        self.device = device
        self.lower = getattr(torch, problem.autocast) if problem.autocast else None
        self.spec = replace(spec, public=self._lowered(spec.public))
        self._base = self._lowered(spec.reference)

    def _lowered(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` under the problem's autocast."""
        if self.lower is None:
            return function

        @functools.wraps(function)  # whose parameters are asked for
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(self.device.type, self.lower):
                return function(*args, **kwargs)

        return run

    @functools.cached_property
    def call(self) -> OpCall:
        return materialise(self.spec, self.sample, self.dtype).map(lambda t: t.to(self.device))

    @functools.cached_property
    def reference(self) -> tuple[torch.Tensor, ...]:
        return tuple(t.cpu() for t in super().reference)

    @functools.cached_property
    def base(self) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return tuple(t.cpu() for t in self.call.run(self._base))

    @functools.cached_property
    def output_grads(self) -> tuple[torch.Tensor, ...]:
        return tuple(g.to(self.device) for g in self.call.output_grads(self.base))

    @functools.cached_property
    def reference_gradients(self) -> dict[str, torch.Tensor | None]:
        return _on_cpu(super().reference_gradients)

    @functools.cached_property
    def base_gradients(self) -> dict[str, torch.Tensor | None]:
        return _on_cpu(
            self.call.gradients(self._base, self.output_grads, names=self.differentiable)
        )


def make_case(problem: Problem, device: torch.device) -> Case:
    """The case that a problem is, on a device."""
    return _Case(problem, device)


def _on_cpu(found: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    return {name: None if t is None else t.cpu() for name, t in found.items()}


def judge(problem: Problem, passes: str, device: torch.device, backend: str = "triton") -> Answer:
    """Run one pass of a problem and judge its outputs, or the gradients that models train."""
    try:
        with plain_arithmetic():
            return _judged(_Case(problem, device), passes, backend)
    except BackendUnavailableError as error:
        return Answer(REFUSED, first_line(error, last=True))
    except torch.cuda.OutOfMemoryError as error:
        return Answer(NO_MEMORY, first_line(error))
    except AssertionError as error:  # a guard zone, or a gradient that should not be there
        return Answer(WRONG, first_line(error))
    except Exception as error:
        broken = device.type == "cuda" and not is_launch_failure(error)
        return Answer(FAILED, f"{type(error).__name__}: {first_line(error)}", broken=broken)


def _judged(case: _Case, passes: str, backend: str) -> Answer:
    results = [_results(case, passes, backend) for _ in range(REPEATS)]
    for i, other in enumerate(results[1:], 1):
        for name, t in results[0].items():
            if not _are_same(t, other[name]):
                return Answer(WRONG, f"repeat {i} of {REPEATS} has other bits in {name}")
    if passes == "forward":
        reports = case.judge([t for t in results[0].values() if t is not None], backend)
    else:
        reports = case.judge_gradients(results[0], backend)
    problems = [text for report in reports for text in report.problems]
    worst = max((report.error_over_budget for report in reports), default=0.0)
    return Answer(WRONG if problems else RIGHT, problems[0] if problems else "", worst)


def _results(case: _Case, passes: str, backend: str) -> dict[str, torch.Tensor | None]:
    """The outputs by number, or the gradients by argument, on the CPU."""
    if passes == "forward":
        outputs = case.outputs(backend=backend)
        return _on_cpu({f"out{i}": t for i, t in enumerate(outputs)})
    return _on_cpu(case.gradients(case.trained, backend=backend))


def _are_same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b if a is None or b is None else same_bits(a, b)


@contextlib.contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Within, torch's own GPU kernels neither round to TF32 nor add in half precision.

    They do by default in convolutions and some products, and their errors would hide ours.
    """
    matmul = torch.backends.cuda.matmul
    flags = [
        (torch.backends.cudnn, "allow_tf32"),
        (matmul, "allow_fp16_reduced_precision_reduction"),
        (matmul, "allow_bf16_reduced_precision_reduction"),
    ]
    before = [getattr(owner, name) for owner, name in flags]
    try:
        for owner, name in flags:
            setattr(owner, name, False)
        yield
    finally:
        for (owner, name), value in zip(flags, before, strict=True):
            setattr(owner, name, value)
