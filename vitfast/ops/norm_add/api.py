"""The public `norm_add`: meaning and checks; registration of `vitfast::norm_add`."""

from __future__ import annotations

from typing import Any

import torch

from vitfast.ops.add_norm.reference import normalise
from vitfast.ops.common import norm as norm_op
from vitfast.ops.common import norm_checks
from vitfast.ops.common.autodiff import gradients, in_order
from vitfast.ops.norm_add import native, reference
from vitfast.ops.norm_add.reference import Call
from vitfast.ops.residual_add.reference import drop_gradient, per_sample
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import define, needs_grad
from vitfast.runtime.triton_backend import lazy


def norm_add(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    drop_scale: torch.Tensor | None = None,
    norm: str = "layer",
    backend: str = "auto",
) -> torch.Tensor:
    """x + drop_scale * (norm(branch) * weight + bias): the residual connection to a normed branch.

    Residual-post-norm (Liu et al. 2022; timm `SwinTransformerV2Block`); `add_norm` is its sibling
    that adds before it normalises. One pass over memory: x and branch are read, the sum written,
    X (x's size + branch's + the sum's) bytes for X elements. The backward keeps the branch and two
    numbers a row, reads branch and gradient and writes the branch's; x's is the gradient itself.

    Args:
        x: [..., C], float32, float16, bfloat16 or float64, any strides.
        branch: shape of x; may have another floating dtype.
        weight, bias: [C]; may have another floating dtype. "rms" takes no bias.
        eps: added to the variance ("layer") or the mean square ("rms").
        drop_scale: [B] floats, one per entry of x's first dimension: DropPath's factor (Huang et
            al. 2016), 0 for a dropped sample, 1 / keep for a kept one.
        norm: "layer" (as `layer_norm`) or "rms" (as `rms_norm`).
        backend: "auto", or a name ("cpu", "reference") that then must be able to run.

    Returns:
        [..., C], contiguous, in the dtype that torch's promotion gives `x + norm(branch)`: under
        autocast on a GPU that norm is float32, on a CPU of the branch's dtype.

    Raises:
        InputTypeError, InputValueError, UnsupportedInputError, DeviceError: bad arguments.
        BackendUnavailableError: the backend asked for cannot run.
    """
    norm_checks.check_residual("norm_add", x, branch, None, drop_scale)
    norm_checks.check("norm_add", branch, weight, bias, eps, None)
    norm_checks.check_kind("norm_add", norm, bias)
    normed_dtype = norm_checks.autocast_out_dtype(branch) or branch.dtype
    dtype = torch.promote_types(x.dtype, normed_dtype)
    save_stats = needs_grad(x, branch, weight, bias, drop_scale)
    y, _ = _OP(x, branch, weight, bias, eps, drop_scale, norm, dtype, save_stats, backend)
    return y


def _reference_forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    y = reference.norm_add(
        call.x.to(call.dtype), call.branch, call.weight, call.bias, call.eps,
        drop_scale=call.drop_scale, norm=call.norm,
    ).contiguous()  # fmt: skip
    if not call.save_stats:
        return y, norm_op.absent(y)
    return y, norm_op.reference_stats(norm_op.KINDS[call.norm], call.branch, call.eps)


def _reference_backward(
    grad: torch.Tensor, call: Call, stats: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    if call.drop_scale is not None:
        grad = grad * per_sample(call.drop_scale, grad)
    return gradients(
        lambda x, w, b: normalise(x, w, b, call.eps, call.norm, grad.dtype),
        (call.branch, call.weight, call.bias),
        (grad,),
    )


def _triton_reasons(call: Call) -> list[str]:
    return norm_op.triton_reasons(call.x, call.branch, call.weight, call.bias, out_dtype=call.dtype)


DISPATCHER = Dispatcher(
    "norm_add",
    [
        native.BACKEND,
        lazy("vitfast.ops.norm_add.triton", _triton_reasons),
        Backend("reference", _reference_forward, lambda call: [], _reference_backward),
    ],
)


def _forward(*args: Any) -> tuple[torch.Tensor, ...]:
    call, backend = Call(*args[:-1]), args[-1]
    return DISPATCHER.pick(backend, call, needs_backward=call.save_stats).forward(call)


def _fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = Call(*args[:-1])
    y = call.x.new_empty(call.x.shape, dtype=call.dtype)
    return y, norm_op.fake_stats(call.branch, call.save_stats)


def _backward(
    grad: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    drop_scale: torch.Tensor | None,
    stats: torch.Tensor,
    norm: str,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    call = Call(grad, branch, weight, bias, eps, drop_scale, norm, grad.dtype, True)
    return DISPATCHER.pick_backward(backend, call)(grad, call, stats)


def _backward_fake(
    grad: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *others: Any,
) -> tuple[torch.Tensor, ...]:
    return norm_op.backward_fake(branch, weight, bias)


_DROP_SCALE = Call._fields.index("drop_scale")
_NORMED = [Call._fields.index(name) for name in ("branch", "weight", "bias")]
"""Their places in `ctx.needs_input_grad`."""


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    call, ctx.backend = Call(*inputs[:-1]), inputs[-1]
    ctx.eps, ctx.norm, ctx.x_dtype = call.eps, call.norm, call.x.dtype
    ctx.save_for_backward(call.branch, call.weight, call.bias, call.drop_scale, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    branch, weight, bias, drop_scale, stats = ctx.saved_tensors
    dbranch = dweight = dbias = ddrop = None
    if any(ctx.needs_input_grad[i] for i in _NORMED):
        dbranch, *found = _BACKWARD_OP(
            grad, branch, weight, bias, ctx.eps, drop_scale, stats, ctx.norm, ctx.backend
        )
        dweight, dbias = norm_op.present(*zip((weight, bias), found, strict=True))
    if ctx.needs_input_grad[_DROP_SCALE]:
        normed = normalise(branch, weight, bias, ctx.eps, ctx.norm, grad.dtype)
        ddrop = drop_gradient(grad, normed, None, drop_scale)
    return in_order(
        Call._fields,
        x=grad.to(ctx.x_dtype),
        branch=dbranch,
        weight=dweight,
        bias=dbias,
        drop_scale=ddrop,
    )


_BACKWARD_OP = define(
    "norm_add_backward",
    "(Tensor grad, Tensor branch, Tensor? weight, Tensor? bias, float eps, Tensor? drop_scale,"
    " Tensor stats, str norm, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_OP = define(
    "norm_add",
    "(Tensor x, Tensor branch, Tensor? weight, Tensor? bias, float eps, Tensor? drop_scale,"
    " str norm, ScalarType dtype, bool save_stats, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_autograd,
)
