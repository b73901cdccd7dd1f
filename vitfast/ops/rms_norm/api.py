"""The public `rms_norm`: meaning and checks; registration of `vitfast::rms_norm`."""

from __future__ import annotations

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common.autodiff import gradients
from vitfast.ops.layer_norm.api import autocast_out_dtype, check
from vitfast.ops.rms_norm import native, reference
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import define, needs_grad
from vitfast.runtime.triton import lazy


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


def _reference_forward(x, weight, eps, out_dtype, save_stats):
    y = reference.rms_norm(x, weight, eps, out_dtype=out_dtype).contiguous()
    return y, norm_op.reference_stats(norm_op.RMS, x, eps) if save_stats else norm_op.absent(x)


def _reference_backward(grad, x, weight, eps, stats):
    return gradients(
        lambda x, w: reference.rms_norm(x, w, eps, out_dtype=grad.dtype), (x, weight), (grad,)
    )


def _triton_reasons(x, weight, eps, out_dtype, save_stats):
    return norm_op.triton_reasons(x, weight, out_dtype=out_dtype)


DISPATCHER = Dispatcher(
    "rms_norm",
    [
        native.BACKEND,
        lazy("vitfast.ops.rms_norm.triton", _triton_reasons),
        Backend("reference", _reference_forward, lambda *args: [], _reference_backward),
    ],
)


def _forward(x, weight, eps, out_dtype, save_stats, backend):
    args = (x, weight, eps, out_dtype, save_stats)
    return DISPATCHER.pick(backend, *args, needs_backward=save_stats).forward(*args)


def _fake(x, weight, eps, out_dtype, save_stats, backend):
    return norm_op.fake(x, out_dtype, save_stats)


def _backward(grad, x, weight, eps, stats, backend):
    args = (x, weight, eps, grad.dtype, True)
    return DISPATCHER.pick(backend, *args, needs_backward=True).backward(
        grad, x, weight, eps, stats
    )


def _backward_fake(grad, x, weight, eps, stats, backend):
    return norm_op.backward_fake(x, weight)


def _setup_context(ctx, inputs, output):
    x, weight, ctx.eps, _, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad, _):
    x, weight, stats = ctx.saved_tensors
    dx, dweight = _BACKWARD_OP(grad, x, weight, ctx.eps, stats, ctx.backend)
    return dx, *norm_op.present((weight, dweight)), None, None, None, None


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
