"""The residual connection as calls of the norm kernels, the CPU's or Triton's."""

from __future__ import annotations

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common.norm import Kernels
from vitfast.ops.residual_add.reference import BackwardCall, Call


def forward(kernels: Kernels, call: Call) -> torch.Tensor:
    residual, _, _ = kernels.forward(
        norm_op.NONE,
        call.x,
        branch=call.branch,
        gamma=call.gamma,
        drop_scale=call.drop_scale,
    )
    assert residual is not None  # with a branch there is one
    return residual


def backward(kernels: Kernels, call: BackwardCall) -> tuple[torch.Tensor, ...]:
    _, dbranch, dgamma, _, _ = kernels.backward(
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
