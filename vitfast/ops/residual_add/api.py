"""The public `residual_add`: meaning and checks; registration of `vitfast::residual_add`."""

from __future__ import annotations

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.residual_add import native, reference
from vitfast.runtime import checks
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import define
from vitfast.runtime.triton import lazy


def residual_add(
    x: torch.Tensor,
    branch: torch.Tensor,
    *,
    gamma: torch.Tensor | None = None,
    drop_scale: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """x + drop_scale * gamma * branch in one pass (timm `Block` with `LayerScale`, `DropPath`).

    Args:
        x: [..., C], float32, float16, bfloat16 or float64, any strides.
        branch: shape of x; may have another floating dtype.
        gamma: [C], LayerScale (Touvron et al. 2021); may have another floating dtype.
        drop_scale: [B] floats, one per entry of x's first dimension: DropPath's factor (Huang et
            al. 2016), 0 for a dropped sample, 1 / keep for a kept one.
        backend: "auto", or a name ("cpu", "reference") that then must be able to run.

    Returns:
        [..., C], contiguous, in the dtype that torch's promotion gives `x + gamma * branch`: a
        float32 residual stream stays float32 where autocast lowers the branch.

    Raises:
        InputTypeError, InputValueError, UnsupportedInputError, DeviceError: bad arguments.
        BackendUnavailableError: the backend asked for cannot run.
    """
    check("residual_add", x, branch, gamma, drop_scale)
    return _OP(x, branch, gamma, drop_scale, backend)


def check(
    op: str,
    x: torch.Tensor,
    branch: torch.Tensor,
    gamma: torch.Tensor | None,
    drop_scale: torch.Tensor | None,
) -> None:
    """The checks that residual_add and add_norm share."""
    checks.check_tensor(op, "x", x)
    checks.check_tensor(op, "branch", branch)
    if x.ndim == 0:
        raise checks.InputValueError(f"{op}: x must have at least one dimension, got a scalar")
    checks.check_shape(op, "branch", branch, tuple(x.shape))
    if gamma is not None:
        checks.check_tensor(op, "gamma", gamma)
        checks.check_shape(op, "gamma", gamma, (x.shape[-1],))
    if drop_scale is not None:
        checks.check_tensor(op, "drop_scale", drop_scale)
        if x.ndim == 1:
            raise checks.InputValueError(f"{op}: drop_scale needs x [B, ..., C], got {x.ndim}-D x")
        checks.check_shape(op, "drop_scale", drop_scale, (x.shape[0],))
    checks.check_same_device(op, x=x, branch=branch, gamma=gamma, drop_scale=drop_scale)


def _reference_forward(x, branch, gamma, drop_scale):
    return reference.residual_add(x, branch, gamma=gamma, drop_scale=drop_scale).contiguous()


def _reference_backward(grad, branch, gamma, drop_scale, branch_dtype):
    dbranch, dgamma = reference.scale_gradients(grad, branch, gamma, drop_scale, branch_dtype)
    return dbranch.contiguous(), norm_op.absent(grad) if dgamma is None else dgamma


def _triton_reasons(x, branch, gamma, drop_scale):
    return norm_op.triton_reasons(x, branch, gamma)


DISPATCHER = Dispatcher(
    "residual_add",
    [
        native.BACKEND,
        lazy("vitfast.ops.residual_add.triton", _triton_reasons),
        Backend("reference", _reference_forward, lambda *args: [], _reference_backward),
    ],
)


def _forward(x, branch, gamma, drop_scale, backend):
    args = (x, branch, gamma, drop_scale)
    return DISPATCHER.pick(backend, *args).forward(*args)


def _fake(x, branch, gamma, drop_scale, backend):
    return x.new_empty(x.shape, dtype=norm_op.residual_dtype(x, branch, gamma))


def _backward(grad, branch, gamma, drop_scale, branch_dtype, backend):
    like_branch = grad.new_empty(0, dtype=branch_dtype)  # it may not have been saved
    picked = DISPATCHER.pick(backend, grad, like_branch, gamma, drop_scale, needs_backward=True)
    return picked.backward(grad, branch, gamma, drop_scale, branch_dtype)


def _backward_fake(grad, branch, gamma, drop_scale, branch_dtype, backend):
    dgamma = norm_op.absent(grad) if branch is None else gamma.new_empty(gamma.shape)
    return grad.new_empty(grad.shape, dtype=branch_dtype), dgamma


def _setup_context(ctx, inputs, output):
    x, branch, gamma, drop_scale, ctx.backend = inputs
    ctx.dtypes = x.dtype, branch.dtype
    branch = branch if any(ctx.needs_input_grad[2:4]) else None
    ctx.save_for_backward(branch, gamma, drop_scale)


def _autograd(ctx, grad):
    branch, gamma, drop_scale = ctx.saved_tensors
    x_dtype, branch_dtype = ctx.dtypes
    dx = grad.to(x_dtype)
    if gamma is None and drop_scale is None:
        return dx, grad.to(branch_dtype), None, None, None
    gamma_wanted, drop_wanted = ctx.needs_input_grad[2:4]
    dbranch, dgamma = _BACKWARD_OP(
        grad, branch if gamma_wanted else None, gamma, drop_scale, branch_dtype, ctx.backend
    )
    ddrop = reference.drop_gradient(grad, branch, gamma, drop_scale) if drop_wanted else None
    return dx, dbranch, dgamma if gamma_wanted else None, ddrop, None


_BACKWARD_OP = define(
    "residual_add_backward",
    "(Tensor grad, Tensor? branch, Tensor? gamma, Tensor? drop_scale, ScalarType branch_dtype,"
    " str backend) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_OP = define(
    "residual_add",
    "(Tensor x, Tensor branch, Tensor? gamma, Tensor? drop_scale, str backend) -> Tensor",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_autograd,
)
