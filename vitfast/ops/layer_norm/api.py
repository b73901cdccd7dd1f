"""The public `layer_norm`: meaning and checks; registration of `vitfast::layer_norm`."""

from __future__ import annotations

from typing import Any

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common.autodiff import gradients, in_order
from vitfast.ops.common.norm_checks import autocast_out_dtype, check
from vitfast.ops.layer_norm import native, reference
from vitfast.ops.layer_norm.reference import Call
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import define, needs_grad
from vitfast.runtime.triton_backend import lazy


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


def _reference_forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    x, eps = call.x, call.eps
    y = reference.layer_norm(x, call.weight, call.bias, eps, out_dtype=call.out_dtype).contiguous()
    if not call.save_stats:
        return y, norm_op.absent(x)
    return y, norm_op.reference_stats(norm_op.LAYER, x, eps)


def _reference_backward(
    grad: torch.Tensor, call: Call, stats: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return gradients(
        lambda x, w, b: reference.layer_norm(x, w, b, call.eps, out_dtype=grad.dtype),
        (call.x, call.weight, call.bias),
        (grad,),
    )


def _triton_reasons(call: Call) -> list[str]:
    return norm_op.triton_reasons(call.x, call.weight, call.bias, out_dtype=call.out_dtype)


DISPATCHER = Dispatcher(
    "layer_norm",
    [
        native.BACKEND,
        lazy("vitfast.ops.layer_norm.triton", _triton_reasons),
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
    bias: torch.Tensor | None,
    eps: float,
    stats: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    call = Call(x, weight, bias, eps, grad.dtype, True)
    return DISPATCHER.pick_backward(backend, call)(grad, call, stats)


def _backward_fake(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *others: Any,
) -> tuple[torch.Tensor, ...]:
    return norm_op.backward_fake(x, weight, bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    call, ctx.backend = Call(*inputs[:-1]), inputs[-1]
    ctx.eps = call.eps
    ctx.save_for_backward(call.x, call.weight, call.bias, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    x, weight, bias, stats = ctx.saved_tensors
    dx, *found = _BACKWARD_OP(grad, x, weight, bias, ctx.eps, stats, ctx.backend)
    dweight, dbias = norm_op.present(*zip((weight, bias), found, strict=True))
    return in_order(Call._fields, x=dx, weight=dweight, bias=dbias)


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
