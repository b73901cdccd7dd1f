"""Inputs for generic code: an OpSpec's samples made reproducibly, and their float64 twins.

Only the attributes of `OpSpec` and `Sample` are used, so that nothing here imports `vitfast.ops`.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vitfast.ops.spec import OpSpec, Sample


def seed_of(*names: object) -> int:
    """A seed that is the same in every process, unlike Python's hash()."""
    text = "/".join(str(n) for n in names)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def generator_of(*names: object) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*names))


def rebuilt(old: Any, values: Iterable[Any]) -> Any:
    """A tuple, named tuple or list like `old` of other values."""
    return type(old)(*values) if hasattr(old, "_fields") else type(old)(values)


def map_tensors(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """`value` with every tensor in nested tuples, lists and dicts replaced by `change(tensor)`."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {k: map_tensors(v, change) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return rebuilt(value, (map_tensors(v, change) for v in value))
    return value


def to_float64(value: Any) -> Any:
    """The float64 twin: floating tensors and dtypes become float64, all else stays."""
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, dict):
        return {k: to_float64(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return rebuilt(value, (to_float64(v) for v in value))
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double()
    return value


def outputs_of(result: Any) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


@dataclass
class OpCall:
    """Arguments of one call of an op, by the names of the public function's parameters."""

    signature: inspect.Signature
    arguments: dict[str, Any]
    names: tuple[object, ...] = field(default=())

    def run(self, function: Callable[..., Any], **more: Any) -> tuple[torch.Tensor, ...]:
        """Call `function`, which has the same parameters, and give its outputs as a tuple."""
        bound = inspect.BoundArguments(self.signature, dict(self.arguments))
        return outputs_of(function(*bound.args, **bound.kwargs, **more))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in self.arguments.items():
            if isinstance(value, torch.Tensor):
                yield name, value

    def floating(self) -> list[str]:
        """Names of the floating tensors."""
        return [name for name, t in self.tensors() if t.is_floating_point()]

    def float64(self) -> OpCall:
        return OpCall(self.signature, to_float64(self.arguments), self.names)

    def changed(self, **arguments: Any) -> OpCall:
        return OpCall(self.signature, {**self.arguments, **arguments}, self.names)

    def map(self, change: Callable[[torch.Tensor], Any]) -> OpCall:
        return OpCall(self.signature, map_tensors(self.arguments, change), self.names)

    def requiring_grad(self, names: Sequence[str] | None = None) -> OpCall:
        """Fresh leaves in the same memory; these (all floating ones by default) require grad."""
        names = self.floating() if names is None else names
        leaves = {n: t.detach().requires_grad_(n in names) for n, t in self.tensors()}
        return self.changed(**leaves)

    def gradients(
        self,
        function: Callable[..., Any],
        grads: Sequence[torch.Tensor] | None = None,
        *,
        names: Sequence[str] | None = None,
        **more: Any,
    ) -> dict[str, torch.Tensor | None]:
        """Gradients of the outputs' weighted sum; None where the function gives none.

        Args:
            grads: gradients of the outputs, cast to their dtypes; `output_grads()` by default.
            names: the arguments to differentiate by; every floating one by default.
        """
        names = self.floating() if names is None else names
        call = self.requiring_grad(names)
        with torch.enable_grad():
            outputs = call.run(function, **more)
        grads = self.output_grads(outputs) if grads is None else grads
        pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        if not pairs:
            return dict.fromkeys(names)
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            [call.arguments[n] for n in names],
            [g for _, g in pairs],
            allow_unused=True,
        )
        return dict(zip(names, found, strict=True))

    def output_grads(self, outputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Gradients for these outputs, N(0, 1) in their dtype; the same on every call."""
        return tuple(
            torch.randn(o.shape, generator=generator_of(*self.names, "grad", i)).to(o.dtype)
            for i, o in enumerate(outputs)
        )


def materialise(spec: OpSpec, sample: Sample, dtype: torch.dtype) -> OpCall:
    """Arguments of one sample, the same in every process.

    Args:
        dtype: the working dtype; passed to the sample, which may keep some arguments in another.
    """
    names = (spec.name, sample.name, dtype)
    args, kwargs = sample.make(dtype, generator_of(*names))
    signature = inspect.signature(spec.public)
    signature = signature.replace(
        parameters=[p for p in signature.parameters.values() if p.name != "backend"]
    )
    return OpCall(signature, dict(signature.bind(*args, **kwargs).arguments), names)


def _transposed(t: torch.Tensor) -> torch.Tensor:
    return t.mT.contiguous().mT


def _sliced(t: torch.Tensor) -> torch.Tensor:
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"))
    wide[..., ::2] = t
    return wide[..., ::2]


def _gapped(t: torch.Tensor) -> torch.Tensor:
    tall = t.new_full((*t.shape[:-2], t.shape[-2] + 3, t.shape[-1]), float("nan"))
    tall[..., : t.shape[-2], :] = t
    return tall[..., : t.shape[-2], :]


def _outermost_last(t: torch.Tensor) -> torch.Tensor:
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


def _shifted(t: torch.Tensor) -> torch.Tensor:
    flat = t.new_full((t.numel() + 1,), float("nan"))
    flat[1:] = t.reshape(-1)
    return flat[1:].view(t.shape)


_LAYOUTS: dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = {
    "transposed": (2, _transposed),
    "every_second_element": (1, _sliced),
    "gaps_between_matrices": (3, _gapped),
    "outermost_dim_last": (3, _outermost_last),
    "shifted_by_one_element": (1, _shifted),
}
LAYOUTS = tuple(_LAYOUTS)


def with_layout(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another layout of `LAYOUTS`; unchanged if it has too few dimensions.

    Memory between the elements is NaN.
    """
    least, change = _LAYOUTS[layout]
    if tensor.ndim < least or not tensor.is_floating_point():
        return tensor
    return change(tensor.detach())
