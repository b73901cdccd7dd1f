"""The public `grn`: meaning and checks; registration of `vitfast::grn`."""

from __future__ import annotations

from typing import Any

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common.autodiff import gradients
from vitfast.ops.grn import native, reference
from vitfast.ops.grn.layout import empty
from vitfast.ops.grn.reference import Call
from vitfast.ops.layer_norm import api as layer_norm_api
from vitfast.runtime import checks
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import define
from vitfast.runtime.triton_backend import lazy


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


def _reference_forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    x = call.x
    y = reference.grn(x, call.weight, call.bias, call.eps, out_dtype=call.out_dtype)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norms = torch.linalg.vector_norm(wide, dim=tuple(range(1, x.ndim - 1)))
    return empty(x, y.dtype).copy_(y), norms


def _reference_backward(
    grad: torch.Tensor, call: Call, norms: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    dx, dweight, dbias = gradients(
        lambda x, weight, bias: reference.grn(x, weight, bias, call.eps, out_dtype=grad.dtype),
        (call.x, call.weight, call.bias),
        (grad,),
    )
    return empty(call.x, call.x.dtype).copy_(dx), dweight, dbias


def _triton_reasons(call: Call) -> list[str]:
    # Any number of channels: the kernels take them in blocks.
    return norm_op.triton_reasons(
        call.x, call.weight, call.bias, out_dtype=call.result_dtype, channels=1
    )


DISPATCHER = Dispatcher(
    "grn",
    [
        native.BACKEND,
        lazy("vitfast.ops.grn.triton", _triton_reasons),
        Backend("reference", _reference_forward, lambda call: [], _reference_backward),
    ],
)


def _forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *inputs, backend = args
    call = Call(*inputs)
    return DISPATCHER.pick(backend, call).forward(call)


def _fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = Call(*args[:-1])
    x = call.x
    norms = torch.promote_types(x.dtype, torch.float32)
    return empty(x, call.result_dtype), x.new_empty((x.shape[0], x.shape[-1]), dtype=norms)


def _backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float,
    norms: torch.Tensor, backend: str,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    call = Call(x, weight, bias, eps, grad.dtype)
    return DISPATCHER.pick_backward(backend, call)(grad, call, norms)


def _backward_fake(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float,
    norms: torch.Tensor, backend: str,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    return empty(x, x.dtype), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *arguments, ctx.backend = inputs
    call, norms = Call(*arguments), output[1]
    ctx.eps = call.eps
    ctx.save_for_backward(call.x, call.weight, call.bias, norms)
    ctx.mark_non_differentiable(norms)


def _autograd(ctx: Any, grad: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
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
