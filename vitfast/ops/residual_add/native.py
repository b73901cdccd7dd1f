"""The residual connection on the kernels of csrc/cpu/norm.h."""

from __future__ import annotations

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.residual_add.reference import BackwardCall, Call
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend


def can_run(call: Call) -> list[str]:
    return norm_op.reasons(call.x, call.branch, call.gamma)


def forward(call: Call) -> torch.Tensor:
    residual, _, _ = norm_op.forward(
        norm_op.NONE,
        call.x,
        branch=call.branch,
        gamma=call.gamma,
        drop_scale=call.drop_scale,
    )
    assert residual is not None  # with a branch there is one
    return residual


def backward(call: BackwardCall) -> tuple[torch.Tensor, ...]:
    _, dbranch, dgamma, _, _ = norm_op.backward(
        norm_op.NONE,
        None,
        call.grad,
        None,
        grad_residual=call.grad,
        branch=call.branch,
        gamma=call.gamma,
        drop_scale=call.drop_scale,
        x_wanted=False,
        branch_dtype=call.branch_dtype,
    )
    return dbranch, dgamma


BACKEND = Backend("cpu", forward, can_run, backward, native.reasons)
