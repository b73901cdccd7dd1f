"""The public `add_norm`: meaning and checks; registration of `vitfast::add_norm`."""

from __future__ import annotations

from typing import Any

import torch

from vitfast.ops.add_norm import native, reference
from vitfast.ops.add_norm.reference import BackwardCall, Call
from vitfast.ops.common import norm as norm_op
from vitfast.ops.common import norm_checks
from vitfast.ops.common.autodiff import gradients, in_order
from vitfast.ops.residual_add.reference import drop_gradient, scale_gradients
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import define, needs_grad
from vitfast.runtime.triton_backend import lazy


def add_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    gamma: torch.Tensor | None = None,
    drop_scale: torch.Tensor | None = None,
    norm: str = "layer",
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual connection and the norm after it, in one pass over memory (timm `Block`).

    residual = x + drop_scale * gamma * branch, normed = norm(residual) * weight + bias.

    Args:
        x: [..., C], float32, float16, bfloat16 or float64, any strides.
        branch: shape of x; may have another floating dtype.
        weight, bias: [C]; may have another floating dtype. "rms" takes no bias.
        eps: added to the variance ("layer") or the mean square ("rms").
        gamma: [C], LayerScale (Touvron et al. 2021); may have another floating dtype.
        drop_scale: [B] floats, one per entry of x's first dimension: DropPath's factor (Huang et
            al. 2016), 0 for a dropped sample, 1 / keep for a kept one.
        norm: "layer" (as `layer_norm`) or "rms" (as `rms_norm`).
        out_dtype: dtype of normed; residual's by default. Lets the operand of a low-precision
            matrix product be written directly.
        backend: "auto", or a name ("cpu", "reference") that then must be able to run.

    Returns:
        residual: [..., C], contiguous, in the dtype that torch's promotion gives
            `x + gamma * branch`: a float32 stream stays float32 where autocast lowers the branch.
        normed: [..., C], contiguous: the norm of residual as rounded to its dtype.

    Raises:
        InputTypeError, InputValueError, UnsupportedInputError, DeviceError: bad arguments.
        BackendUnavailableError: the backend asked for cannot run.
    """
    norm_checks.check_residual("add_norm", x, branch, gamma, drop_scale)
    norm_checks.check("add_norm", x, weight, bias, eps, out_dtype)
    norm_checks.check_kind("add_norm", norm, bias)
    out_dtype = out_dtype or norm_checks.autocast_out_dtype(x)
    save_stats = needs_grad(x, branch, weight, bias, gamma, drop_scale)
    residual, normed, _ = _OP(
        x, branch, weight, bias, eps, gamma, drop_scale, norm, out_dtype, save_stats, backend
    )
    return residual, normed


def _reference_forward(call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    residual, normed = reference.add_norm(
        call.x, call.branch, call.weight, call.bias, call.eps, gamma=call.gamma,
        drop_scale=call.drop_scale, norm=call.norm, out_dtype=call.out_dtype,
    )  # fmt: skip
    if call.save_stats:
        stats = norm_op.reference_stats(norm_op.KINDS[call.norm], residual, call.eps)
    else:
        stats = norm_op.absent(residual)
    return residual.contiguous(), normed.contiguous(), stats


def _reference_backward(call: BackwardCall) -> tuple[torch.Tensor, ...]:
    grad, dweight, dbias = _of_norm(call)
    dx = grad.to(call.x_dtype, memory_format=torch.contiguous_format, copy=True)
    dbranch = dgamma = None
    if call.branch_dtype is not None:
        dbranch, dgamma = scale_gradients(
            grad, call.branch, call.gamma, call.drop_scale, call.branch_dtype
        )
        dbranch = dbranch.contiguous()
    return norm_op.filled(dx, dx, dbranch, dgamma, dweight, dbias)


def _of_norm(
    call: BackwardCall,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the residual (through both results), weight and bias."""
    if call.grad_normed is None:
        assert call.grad_residual is not None  # without both there is no backward
        dweight, dbias = (
            None if t is None else torch.zeros_like(t) for t in (call.weight, call.bias)
        )
        return call.grad_residual, dweight, dbias
    dtype = call.grad_normed.dtype
    grad, dweight, dbias = gradients(
        lambda r, w, b: reference.normalise(r, w, b, call.eps, call.norm, dtype),
        (call.residual, call.weight, call.bias),
        (call.grad_normed,),
    )
    return grad if call.grad_residual is None else grad + call.grad_residual, dweight, dbias


def _triton_reasons(call: Call) -> list[str]:
    return norm_op.triton_reasons(
        call.x, call.branch, call.weight, call.bias, call.gamma, out_dtype=call.out_dtype
    )


DISPATCHER = Dispatcher(
    "add_norm",
    [
        native.BACKEND,
        lazy("vitfast.ops.add_norm.triton", _triton_reasons),
        Backend("reference", _reference_forward, lambda call: [], _reference_backward),
    ],
)


def _forward(*args: Any) -> tuple[torch.Tensor, ...]:
    call, backend = Call(*args[:-1]), args[-1]
    return DISPATCHER.pick(backend, call, needs_backward=call.save_stats).forward(call)


def _fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    call = Call(*args[:-1])
    dtype = norm_op.residual_dtype(call.x, call.branch, call.gamma)
    residual = call.x.new_empty(call.x.shape, dtype=dtype)
    normed = call.x.new_empty(call.x.shape, dtype=call.out_dtype or dtype)
    return residual, normed, norm_op.fake_stats(call.x, call.save_stats)


def _backward(*args: Any) -> tuple[torch.Tensor, ...]:
    call, backend = BackwardCall(*args[:-1]), args[-1]
    return DISPATCHER.pick_backward(backend, call.forward_call())(call)


def _backward_fake(*args: Any) -> tuple[torch.Tensor, ...]:
    call = BackwardCall(*args[:-1])
    residual = call.residual
    dbranch = norm_op.absent(residual)
    if call.branch_dtype is not None:
        dbranch = residual.new_empty(residual.shape, dtype=call.branch_dtype)
    dx, *vectors = norm_op.backward_fake(
        residual,
        None if call.branch is None else call.gamma,
        call.weight,
        call.bias,
        dtype=call.x_dtype,
    )
    return dx, dbranch, *vectors


_GAMMA, _DROP_SCALE = (Call._fields.index(name) for name in ("gamma", "drop_scale"))
"""Their places in `ctx.needs_input_grad`."""


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    call, ctx.backend = Call(*inputs[:-1]), inputs[-1]
    residual, _, stats = output
    ctx.eps, ctx.norm, ctx.dtypes = call.eps, call.norm, (call.x.dtype, call.branch.dtype)
    wanted = ctx.needs_input_grad
    branch = call.branch if wanted[_GAMMA] or wanted[_DROP_SCALE] else None
    ctx.save_for_backward(
        residual, branch, call.weight, call.bias, call.gamma, call.drop_scale, stats
    )
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _autograd(
    ctx: Any, grad_residual: torch.Tensor | None, grad_normed: torch.Tensor | None, _: Any
) -> tuple[torch.Tensor | None, ...]:
    residual, branch, weight, bias, gamma, drop_scale, stats = ctx.saved_tensors
    x_dtype, branch_dtype = ctx.dtypes
    gamma_wanted, drop_wanted = (ctx.needs_input_grad[i] for i in (_GAMMA, _DROP_SCALE))
    # A plain sum has one gradient for both terms.
    shared = gamma is None and drop_scale is None and x_dtype == branch_dtype
    call = BackwardCall(
        grad_residual, grad_normed, residual, branch if gamma_wanted else None, weight, bias,
        ctx.eps, gamma, drop_scale, stats, ctx.norm, residual.dtype if drop_wanted else x_dtype,
        None if shared else branch_dtype,
    )  # fmt: skip
    dx, dbranch, dgamma, *found = _BACKWARD_OP(*call, ctx.backend)
    dweight, dbias = norm_op.present(*zip((weight, bias), found, strict=True))
    return in_order(
        Call._fields,
        x=dx.to(x_dtype),
        branch=dx if shared else dbranch,
        weight=dweight,
        bias=dbias,
        gamma=dgamma if gamma_wanted else None,
        drop_scale=drop_gradient(dx, branch, gamma, drop_scale) if drop_wanted else None,
    )


_BACKWARD_OP = define(
    "add_norm_backward",
    "(Tensor? grad_residual, Tensor? grad_normed, Tensor residual, Tensor? branch, Tensor? weight,"
    " Tensor? bias, float eps, Tensor? gamma, Tensor? drop_scale, Tensor stats, str norm,"
    " ScalarType x_dtype, ScalarType? branch_dtype, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_OP = define(
    "add_norm",
    "(Tensor x, Tensor branch, Tensor? weight, Tensor? bias, float eps, Tensor? gamma,"
    " Tensor? drop_scale, str norm, ScalarType? out_dtype, bool save_stats, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_autograd,
)
