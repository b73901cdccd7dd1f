"""The public `residual_add`: meaning and checks; registration of `vitfast::residual_add`."""

from __future__ import annotations

from typing import Any

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common.autodiff import in_order
from vitfast.ops.common.norm_checks import check_residual
from vitfast.ops.residual_add import native, reference
from vitfast.ops.residual_add.reference import BackwardCall, Call
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import define
from vitfast.runtime.triton_backend import lazy


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
    check_residual("residual_add", x, branch, gamma, drop_scale)
    return _OP(x, branch, gamma, drop_scale, backend)


def _reference_forward(call: Call) -> torch.Tensor:
    return reference.residual_add(
        call.x, call.branch, gamma=call.gamma, drop_scale=call.drop_scale
    ).contiguous()


def _reference_backward(call: BackwardCall) -> tuple[torch.Tensor, ...]:
    dbranch, dgamma = reference.scale_gradients(*call)
    return norm_op.filled(dbranch, dbranch.contiguous(), dgamma)


def _triton_reasons(call: Call) -> list[str]:
    return norm_op.triton_reasons(call.x, call.branch, call.gamma)


DISPATCHER = Dispatcher(
    "residual_add",
    [
        native.BACKEND,
        lazy("vitfast.ops.residual_add.triton", _triton_reasons),
        Backend("reference", _reference_forward, lambda call: [], _reference_backward),
    ],
)


def _forward(*args: Any) -> torch.Tensor:
    call, backend = Call(*args[:-1]), args[-1]
    return DISPATCHER.pick(backend, call).forward(call)


def _fake(*args: Any) -> torch.Tensor:
    call = Call(*args[:-1])
    dtype = norm_op.residual_dtype(call.x, call.branch, call.gamma)
    return call.x.new_empty(call.x.shape, dtype=dtype)


def _backward(*args: Any) -> tuple[torch.Tensor, ...]:
    call, backend = BackwardCall(*args[:-1]), args[-1]
    return DISPATCHER.pick_backward(backend, call.forward_call())(call)


def _backward_fake(*args: Any) -> tuple[torch.Tensor, ...]:
    call = BackwardCall(*args[:-1])
    gamma = None if call.branch is None else call.gamma
    return norm_op.backward_fake(call.grad, gamma, dtype=call.branch_dtype)


_GAMMA, _DROP_SCALE = (Call._fields.index(name) for name in ("gamma", "drop_scale"))
"""Their places in `ctx.needs_input_grad`."""


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    call, ctx.backend = Call(*inputs[:-1]), inputs[-1]
    ctx.dtypes = call.x.dtype, call.branch.dtype
    wanted = ctx.needs_input_grad
    branch = call.branch if wanted[_GAMMA] or wanted[_DROP_SCALE] else None
    ctx.save_for_backward(branch, call.gamma, call.drop_scale)


def _autograd(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    branch, gamma, drop_scale = ctx.saved_tensors
    x_dtype, branch_dtype = ctx.dtypes
    dx = grad.to(x_dtype)
    if gamma is None and drop_scale is None:
        return in_order(Call._fields, x=dx, branch=grad.to(branch_dtype))
    gamma_wanted, drop_wanted = (ctx.needs_input_grad[i] for i in (_GAMMA, _DROP_SCALE))
    dbranch, dgamma = _BACKWARD_OP(
        grad, branch if gamma_wanted else None, gamma, drop_scale, branch_dtype, ctx.backend
    )
    ddrop = reference.drop_gradient(grad, branch, gamma, drop_scale) if drop_wanted else None
    return in_order(
        Call._fields,
        x=dx,
        branch=dbranch,
        gamma=dgamma if gamma_wanted else None,
        drop_scale=ddrop,
    )


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
