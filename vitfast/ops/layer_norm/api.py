"""The public `layer_norm`: meaning and checks; registration of `vitfast::layer_norm`."""

from __future__ import annotations

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common.autodiff import gradients
from vitfast.ops.layer_norm import native, reference
from vitfast.runtime import checks
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import autocast_dtype, define, needs_grad
from vitfast.runtime.triton import lazy


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """LayerNorm over the last dimension (Ba et al. 2016; `torch.nn.LayerNorm`, timm `LayerNorm`).

    Args:
        x: [..., C], float32, float16, bfloat16 or float64, any strides.
        weight, bias: [C]; may have another floating dtype than x.
        eps: added to the variance. timm's default is 1e-6, torch's 1e-5.
        out_dtype: dtype of the result; x's by default. Lets the operand of a low-precision matrix
            product be written directly.
        backend: "auto", or a name ("cpu", "reference") that then must be able to run.

    Returns:
        [..., C], contiguous. Statistics are accumulated in float32 (float64 for float64).

    Raises:
        InputTypeError, InputValueError, UnsupportedInputError, DeviceError: bad arguments.
        BackendUnavailableError: the backend asked for cannot run.
    """
    check("layer_norm", x, weight, bias, eps, out_dtype)
    out_dtype = out_dtype or autocast_out_dtype(x)
    y, _ = _OP(x, weight, bias, eps, out_dtype, needs_grad(x, weight, bias), backend)
    return y


def check(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
    channels: int | None = None,
) -> None:
    """The checks that all norms share; weight and bias are [channels], by default x's."""
    checks.check_tensor(op, "x", x)
    if x.ndim == 0:
        raise checks.InputValueError(f"{op}: x must have at least one dimension, got a scalar")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            checks.check_tensor(op, name, t)
            checks.check_shape(op, name, t, (x.shape[-1] if channels is None else channels,))
    checks.check_same_device(op, x=x, weight=weight, bias=bias)
    checks.check_eps(op, eps)
    if out_dtype is not None and out_dtype not in checks.FLOATS:
        raise checks.InputTypeError(f"{op}: out_dtype must be a floating dtype, got {out_dtype}")


def autocast_out_dtype(x: torch.Tensor) -> torch.dtype | None:
    """torch's autocast rule for norms: float32 on CUDA, none on the CPU."""
    if x.device.type != "cuda" or x.dtype == torch.float64 or autocast_dtype(x.device) is None:
        return None
    return torch.float32


def _reference_forward(x, weight, bias, eps, out_dtype, save_stats):
    y = reference.layer_norm(x, weight, bias, eps, out_dtype=out_dtype).contiguous()
    return y, norm_op.reference_stats(norm_op.LAYER, x, eps) if save_stats else norm_op.absent(x)


def _reference_backward(grad, x, weight, bias, eps, stats):
    return gradients(
        lambda x, w, b: reference.layer_norm(x, w, b, eps, out_dtype=grad.dtype),
        (x, weight, bias),
        (grad,),
    )


def _triton_reasons(x, weight, bias, eps, out_dtype, save_stats):
    return norm_op.triton_reasons(x, weight, bias, out_dtype=out_dtype)


DISPATCHER = Dispatcher(
    "layer_norm",
    [
        native.BACKEND,
        lazy("vitfast.ops.layer_norm.triton", _triton_reasons),
        Backend("reference", _reference_forward, lambda *args: [], _reference_backward),
    ],
)


def _forward(x, weight, bias, eps, out_dtype, save_stats, backend):
    args = (x, weight, bias, eps, out_dtype, save_stats)
    return DISPATCHER.pick(backend, *args, needs_backward=save_stats).forward(*args)


def _fake(x, weight, bias, eps, out_dtype, save_stats, backend):
    return norm_op.fake(x, out_dtype, save_stats)


def _backward(grad, x, weight, bias, eps, stats, backend):
    args = (x, weight, bias, eps, grad.dtype, True)
    return DISPATCHER.pick(backend, *args, needs_backward=True).backward(
        grad, x, weight, bias, eps, stats
    )


def _backward_fake(grad, x, weight, bias, eps, stats, backend):
    return norm_op.backward_fake(x, weight, bias)


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.eps, _, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad, _):
    x, weight, bias, stats = ctx.saved_tensors
    dx, dweight, dbias = _BACKWARD_OP(grad, x, weight, bias, ctx.eps, stats, ctx.backend)
    return dx, *norm_op.present((weight, dweight), (bias, dbias)), None, None, None, None


_BACKWARD_OP = define(
    "layer_norm_backward",
    "(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor stats, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_OP = define(
    "layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType? out_dtype, bool save_stats,"
    " str backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_autograd,
)
