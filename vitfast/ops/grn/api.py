"""The public `grn`: meaning and checks; registration of `vitfast::grn`."""

from __future__ import annotations

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common.autodiff import gradients
from vitfast.ops.grn import native, reference
from vitfast.ops.grn.layout import empty
from vitfast.ops.layer_norm import api as layer_norm_api
from vitfast.runtime import checks, triton
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import define


def grn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Global response norm: each channel scaled by its share of the image's energy.

    ConvNeXt V2 (Woo et al. 2023), timm `GlobalResponseNorm`: y = x + (bias + weight * x * n), where
    n = g / (mean of g over channels + eps) and g is the Euclidean norm of a channel over all
    positions of its image. Memory's floor: x is read twice and the result written once; the
    backward reads x and the gradient twice and writes x's. Where an image fits the caches the
    second time comes from them. For the backward it keeps x and B C numbers.

    Args:
        x: [B, H, W, C] or [B, N, C], float32, float16, bfloat16 or float64, any strides. Two
            layouts are fast: contiguous, and the permuted view of a contiguous [B, C, H, W].
        weight, bias: [C]; may have another floating dtype than x.
        eps: added to the mean of the norms.
        out_dtype: dtype of the result. By default what torch makes of x, weight and bias, and under
            CUDA's autocast float32. Lets the operand of a low-precision matrix product be written
            directly.
        backend: "auto", or a name ("cpu", "reference") that then must be able to run.

    Returns:
        x's shape; a permuted view of a contiguous [B, C, H, W] where x is one, else contiguous.
        Statistics are accumulated in float32 (float64 for float64) or better.

    Raises:
        InputTypeError, InputValueError, UnsupportedInputError, DeviceError: bad arguments.
        BackendUnavailableError: the backend asked for cannot run.
    """
    checks.check_tensor("grn", "x", x)
    if x.ndim not in (3, 4):
        raise checks.InputValueError(
            f"grn: x must be [B, H, W, C] or [B, N, C], got shape {tuple(x.shape)}"
        )
    for name, t in (("weight", weight), ("bias", bias)):
        checks.check_tensor("grn", name, t)
    layer_norm_api.check("grn", x, weight, bias, eps, out_dtype)
    out_dtype = out_dtype or layer_norm_api.autocast_out_dtype(x)
    y, _ = _OP(x, weight, bias, eps, out_dtype, backend)
    return y


def _reference_forward(x, weight, bias, eps, out_dtype):
    y = reference.grn(x, weight, bias, eps, out_dtype=out_dtype)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norms = torch.linalg.vector_norm(wide, dim=tuple(range(1, x.ndim - 1)))
    return empty(x, y.dtype).copy_(y), norms


def _reference_backward(grad, x, weight, bias, eps, norms):
    dx, dweight, dbias = gradients(
        lambda x, w, b: reference.grn(x, w, b, eps, out_dtype=grad.dtype),
        (x, weight, bias),
        (grad,),
    )
    return empty(x, x.dtype).copy_(dx), dweight, dbias


def _triton_reasons(x, weight, bias, eps, out_dtype):
    out_dtype = out_dtype or reference.promoted(x, weight, bias)
    return norm_op.triton_reasons(x, weight, bias, out_dtype=out_dtype, channels=1)


DISPATCHER = Dispatcher(
    "grn",
    [
        native.BACKEND,
        triton.lazy("vitfast.ops.grn.triton", _triton_reasons),
        Backend("reference", _reference_forward, lambda *args: [], _reference_backward),
    ],
)


def _forward(x, weight, bias, eps, out_dtype, backend):
    args = (x, weight, bias, eps, out_dtype)
    return DISPATCHER.pick(backend, *args).forward(*args)


def _fake(x, weight, bias, eps, out_dtype, backend):
    norms = torch.promote_types(x.dtype, torch.float32)
    return (
        empty(x, out_dtype or reference.promoted(x, weight, bias)),
        x.new_empty((x.shape[0], x.shape[-1]), dtype=norms),
    )


def _backward(grad, x, weight, bias, eps, norms, backend):
    picked = DISPATCHER.pick(backend, x, weight, bias, eps, grad.dtype, needs_backward=True)
    return picked.backward(grad, x, weight, bias, eps, norms)


def _backward_fake(grad, x, weight, bias, eps, norms, backend):
    return empty(x, x.dtype), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.eps, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad, _):
    x, weight, bias, norms = ctx.saved_tensors
    dx, dweight, dbias = _BACKWARD_OP(grad, x, weight, bias, ctx.eps, norms, ctx.backend)
    return dx, dweight, dbias, None, None, None


_BACKWARD_OP = define(
    "grn_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor bias, float eps, Tensor norms, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_OP = define(
    "grn",
    "(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType? out_dtype, str backend)"
    " -> (Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_autograd,
)
