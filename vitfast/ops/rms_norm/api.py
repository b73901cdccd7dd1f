"""The public `rms_norm`: meaning and checks; registration of `vitfast::rms_norm`."""

from __future__ import annotations

from typing import Any

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common.autodiff import gradients, in_order
from vitfast.ops.common.norm_checks import autocast_out_dtype, check
from vitfast.ops.rms_norm import native, reference
from vitfast.ops.rms_norm.reference import Call
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import define, needs_grad
from vitfast.runtime.triton_backend import lazy


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """RMSNorm over the last dimension (Zhang, Sennrich 2019; `torch.nn.RMSNorm`, timm `RmsNorm`).

    Args:
        x: [..., C], float32, float16, bfloat16 or float64, any strides.
        weight: [C]; may have another floating dtype than x.
        eps: added to the mean square.
        out_dtype: dtype of the result; x's by default, as `torch.nn.functional.rms_norm` (timm's
            own formula promotes to weight's instead: pass that to have it).
        backend: "auto", or a name ("cpu", "reference") that then must be able to run.

    Returns:
        [..., C], contiguous. Statistics are accumulated in float32 (float64 for float64).

    Raises:
        InputTypeError, InputValueError, UnsupportedInputError, DeviceError: bad arguments.
        BackendUnavailableError: the backend asked for cannot run.
    """
    check("rms_norm", x, weight, None, eps, out_dtype)
    out_dtype = out_dtype or autocast_out_dtype(x)
    y, _ = _OP(x, weight, eps, out_dtype, needs_grad(x, weight), backend)
    return y


def _reference_forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    x, eps = call.x, call.eps
    y = reference.rms_norm(x, call.weight, eps, out_dtype=call.out_dtype).contiguous()
    if not call.save_stats:
        return y, norm_op.absent(x)
    return y, norm_op.reference_stats(norm_op.RMS, x, eps)


def _reference_backward(
    grad: torch.Tensor, call: Call, stats: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return gradients(
        lambda x, w: reference.rms_norm(x, w, call.eps, out_dtype=grad.dtype),
        (call.x, call.weight),
        (grad,),
    )


def _triton_reasons(call: Call) -> list[str]:
    return norm_op.triton_reasons(call.x, call.weight, out_dtype=call.out_dtype)


DISPATCHER = Dispatcher(
    "rms_norm",
    [
        native.BACKEND,
        lazy("vitfast.ops.rms_norm.triton", _triton_reasons),
        Backend("reference", _reference_forward, lambda call: [], _reference_backward),
    ],
)


def _forward(*args: Any) -> tuple[torch.Tensor, ...]:
    call, backend = Call(*args[:-1]), args[-1]
    return DISPATCHER.pick(backend, call, needs_backward=call.save_stats).forward(call)


def _fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = Call(*args[:-1])
    return norm_op.fake(call.x, call.out_dtype, call.save_stats)


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    stats: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    call = Call(x, weight, eps, grad.dtype, True)
    return DISPATCHER.pick_backward(backend, call)(grad, call, stats)


def _backward_fake(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, *others: Any
) -> tuple[torch.Tensor, ...]:
    return norm_op.backward_fake(x, weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    call, ctx.backend = Call(*inputs[:-1]), inputs[-1]
    ctx.eps = call.eps
    ctx.save_for_backward(call.x, call.weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    x, weight, stats = ctx.saved_tensors
    dx, dweight = _BACKWARD_OP(grad, x, weight, ctx.eps, stats, ctx.backend)
    return in_order(Call._fields, x=dx, weight=None if weight is None else dweight)


_BACKWARD_OP = define(
    "rms_norm_backward",
    "(Tensor grad, Tensor x, Tensor? weight, float eps, Tensor stats, str backend)"
    " -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_OP = define(
    "rms_norm",
    "(Tensor x, Tensor? weight, float eps, ScalarType? out_dtype, bool save_stats, str backend)"
    " -> (Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_autograd,
)
