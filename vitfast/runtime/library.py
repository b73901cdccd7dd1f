"""The `vitfast` torch.library namespace: one registered op per public call.

`define` registers schema, implementation, fake kernel and autograd in one go. It writes out what
torch.library.register_autograd would do, because that lists the schema's arguments again and again
in every recorded call; the figures are in benchmarks/README.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from vitfast.errors import NotTwiceDifferentiableError
from vitfast.runtime.kernel_calls import recorder
from vitfast.runtime.watched import is_unwatched

_LIBRARY = torch.library.Library("vitfast", "DEF")


def define(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Register `vitfast::<name>` for every device and return a function that calls it, whose `op`
    is its handle.

    Where nothing could see the difference, in eager inference, that function runs the
    implementation at once: the boundary of an op costs as much as a small kernel's launch.

    Args:
        schema: arguments and returns, e.g. "(Tensor x, float eps) -> Tensor"; no defaults, nothing
            keyword-only, no lists of tensors, nothing mutated.
        fake: shapes, dtypes and true strides of the outputs, from fake inputs.
        setup_context, backward: as torch.library.register_autograd. Without a backward the op
            refuses to be differentiated (it is somebody's backward itself).
    """
    qualified = f"vitfast::{name}"
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    op = getattr(torch.ops.vitfast, name).default
    _LIBRARY.impl(name, _autograd_kernel(op, setup_context, backward), "Autograd", with_keyset=True)

    def call(*args: Any) -> Any:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or _watchers:
            return op(*args)
        if recorder.get() is not None:  # its mode is to see what the op is made of
            return implementation(*args)
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if is_unwatched(*tensors) and not torch._C._autograd._profiler_enabled():
            return implementation(*args)
        return op(*args)

    call.op = op  # type: ignore[attr-defined]
    return call


def _autograd_kernel(
    op: torch._ops.OpOverload,
    setup_context: Callable[..., None] | None,
    backward: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """The op under the Autograd key: recorded if an argument requires grad, else passed on."""

    def below(keyset: torch._C.DispatchKeySet, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def record(ctx: Any, *args: Any) -> Any:
        *given, keyset = args
        inputs = tuple(given)
        result = below(keyset, inputs)
        if setup_context is not None:
            setup_context(ctx=ctx, inputs=inputs, output=result)
        return result

    def differentiate(ctx: Any, *grads: Any) -> Any:
        if backward is None:
            raise NotTwiceDifferentiableError(
                f"{op.name()}: gradients of gradients are not implemented; "
                "use vitfast.restore(model), or settings.disable = True"
            )
        result = backward(ctx, *grads)
        return (*result, None) if isinstance(result, tuple) else (result, None)

    function: Any = type(
        f"Recorded_{op._opname}",
        (torch.autograd.Function,),
        {"forward": staticmethod(record), "backward": staticmethod(differentiate)},
    )

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        for note in _watchers:
            note(op._opname, {a.name: v for a, v in zip(op._schema.arguments, args, strict=True)})
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args, keyset)
        return below(keyset, args)

    return kernel


_watchers: list[Callable[[str, Mapping[str, Any]], None]] = []


@contextlib.contextmanager
def watching(note: Callable[[str, Mapping[str, Any]], None]) -> Iterator[None]:
    """Within, note(name of the op, its arguments by name) is called at every call of an op, those
    of gradients and in inference mode left out."""

    def forward_only(name: str, arguments: Mapping[str, Any]) -> None:
        if not name.endswith("_backward"):
            note(name, arguments)

    _watchers.append(forward_only)
    try:
        yield
    finally:
        _watchers.remove(forward_only)


def is_watched() -> bool:
    """Whether somebody is `watching`."""
    return bool(_watchers)


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will record a call with these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype autocast would lower a matrix product to on this device; None when it is off."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """For a body whose inputs are cast already: float32 matrix products have to stay float32."""
    if autocast_dtype(device) is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocast_args(
    device: torch.device, tensors: Sequence[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """Cast as `torch.autocast` would for a matrix product: floating tensors below float64."""
    dtype = autocast_dtype(device)
    if dtype is None:
        return list(tensors)
    return [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    ]
