"""The public `add_norm`: meaning and checks; registration of `vitfast::add_norm`."""

from __future__ import annotations

import torch

from vitfast.ops.add_norm import native, reference
from vitfast.ops.common import norm as norm_op
from vitfast.ops.common.autodiff import gradients
from vitfast.ops.layer_norm import api as layer_norm_api
from vitfast.ops.residual_add import api as residual_add_api
from vitfast.ops.residual_add.reference import drop_gradient, scale_gradients
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import define, needs_grad
from vitfast.runtime.triton import lazy


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
    residual_add_api.check("add_norm", x, branch, gamma, drop_scale)
    layer_norm_api.check("add_norm", x, weight, bias, eps, out_dtype)
    norm_op.check_kind("add_norm", norm, bias)
    out_dtype = out_dtype or layer_norm_api.autocast_out_dtype(x)
    save_stats = needs_grad(x, branch, weight, bias, gamma, drop_scale)
    residual, normed, _ = _OP(
        x, branch, weight, bias, eps, gamma, drop_scale, norm, out_dtype, save_stats, backend
    )
    return residual, normed


def _reference_forward(
    x, branch, weight, bias, eps, gamma, drop_scale, norm, out_dtype, save_stats
):
    residual, normed = reference.add_norm(
        x, branch, weight, bias, eps, gamma=gamma, drop_scale=drop_scale, norm=norm,
        out_dtype=out_dtype,
    )  # fmt: skip
    kind = norm_op.KINDS[norm]
    stats = norm_op.reference_stats(kind, residual, eps) if save_stats else norm_op.absent(x)
    return residual.contiguous(), normed.contiguous(), stats


def _reference_backward(
    grad_residual, grad_normed, residual, branch, weight, bias, eps, gamma, drop_scale, stats, norm,
    x_dtype, branch_dtype,
):  # fmt: skip
    def normed(r, w, b):
        return reference.normalise(r, w, b, eps, norm, grad_normed.dtype)

    if grad_normed is None:
        grad = grad_residual
        dweight, dbias = (
            norm_op.absent(residual) if t is None else torch.zeros_like(t) for t in (weight, bias)
        )
    else:
        grad, dweight, dbias = gradients(normed, (residual, weight, bias), (grad_normed,))
        if grad_residual is not None:
            grad = grad + grad_residual
    dx = grad.to(x_dtype, memory_format=torch.contiguous_format, copy=True)
    if branch_dtype is None:
        return dx, norm_op.absent(dx), norm_op.absent(dx), dweight, dbias
    dbranch, dgamma = scale_gradients(grad, branch, gamma, drop_scale, branch_dtype)
    dgamma = norm_op.absent(dx) if dgamma is None else dgamma
    return dx, dbranch.contiguous(), dgamma, dweight, dbias


def _triton_reasons(x, branch, weight, bias, eps, gamma, drop_scale, norm, out_dtype, save_stats):
    return norm_op.triton_reasons(x, branch, weight, bias, gamma, out_dtype=out_dtype)


DISPATCHER = Dispatcher(
    "add_norm",
    [
        native.BACKEND,
        lazy("vitfast.ops.add_norm.triton", _triton_reasons),
        Backend("reference", _reference_forward, lambda *args: [], _reference_backward),
    ],
)


def _forward(x, branch, weight, bias, eps, gamma, drop_scale, norm, out_dtype, save_stats, backend):
    args = (x, branch, weight, bias, eps, gamma, drop_scale, norm, out_dtype, save_stats)
    return DISPATCHER.pick(backend, *args, needs_backward=save_stats).forward(*args)


def _fake(x, branch, weight, bias, eps, gamma, drop_scale, norm, out_dtype, save_stats, backend):
    dtype = norm_op.residual_dtype(x, branch, gamma)
    residual = x.new_empty(x.shape, dtype=dtype)
    return (
        residual,
        x.new_empty(x.shape, dtype=out_dtype or dtype),
        norm_op.fake_stats(x, save_stats),
    )


def _backward(
    grad_residual, grad_normed, residual, branch, weight, bias, eps, gamma, drop_scale, stats, norm,
    x_dtype, branch_dtype, backend,
):  # fmt: skip
    like_branch = residual.new_empty(0, dtype=branch_dtype)  # it may not have been saved
    picked = DISPATCHER.pick(
        backend, residual, like_branch, weight, bias, eps, gamma, drop_scale, norm, x_dtype, True,
        needs_backward=True,
    )  # fmt: skip
    return picked.backward(
        grad_residual, grad_normed, residual, branch, weight, bias, eps, gamma, drop_scale, stats,
        norm, x_dtype, branch_dtype,
    )  # fmt: skip


def _backward_fake(
    grad_residual, grad_normed, residual, branch, weight, bias, eps, gamma, drop_scale, stats, norm,
    x_dtype, branch_dtype, backend,
):  # fmt: skip
    dbranch = norm_op.absent(residual)
    if branch_dtype is not None:
        dbranch = residual.new_empty(residual.shape, dtype=branch_dtype)
    dx, *vectors = norm_op.backward_fake(
        residual, None if branch is None else gamma, weight, bias, dtype=x_dtype
    )
    return dx, dbranch, *vectors


def _setup_context(ctx, inputs, output):
    x, branch, weight, bias, ctx.eps, gamma, drop_scale, ctx.norm, _, _, ctx.backend = inputs
    residual, _, stats = output
    ctx.dtypes = x.dtype, branch.dtype
    branch = branch if any(ctx.needs_input_grad[5:7]) else None
    ctx.save_for_backward(residual, branch, weight, bias, gamma, drop_scale, stats)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_residual, grad_normed, _):
    residual, branch, weight, bias, gamma, drop_scale, stats = ctx.saved_tensors
    x_dtype, branch_dtype = ctx.dtypes
    gamma_wanted, drop_wanted = ctx.needs_input_grad[5:7]
    # A plain sum has one gradient for both terms.
    shared = gamma is None and drop_scale is None and x_dtype == branch_dtype
    dx, dbranch, dgamma, dweight, dbias = _BACKWARD_OP(
        grad_residual, grad_normed, residual, branch if gamma_wanted else None, weight, bias,
        ctx.eps, gamma, drop_scale, stats, ctx.norm, residual.dtype if drop_wanted else x_dtype,
        None if shared else branch_dtype, ctx.backend,
    )  # fmt: skip
    dbranch = dx if shared else dbranch
    dweight, dbias = norm_op.present((weight, dweight), (bias, dbias))
    dgamma = dgamma if gamma_wanted else None
    ddrop = drop_gradient(dx, branch, gamma, drop_scale) if drop_wanted else None
    return dx.to(x_dtype), dbranch, dweight, dbias, None, dgamma, ddrop, None, None, None, None


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
