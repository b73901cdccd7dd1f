"""The residual connection on the kernels of vitfast/ops/common/norm_triton_kernels.py."""

from __future__ import annotations

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common import norm_triton
from vitfast.ops.residual_add.reference import BackwardCall, Call
from vitfast.runtime.launches import Arch, Variant


def forward(call: Call) -> torch.Tensor:
    residual, _, _ = norm_triton.forward(
        norm_op.NONE,
        call.x,
        branch=call.branch,
        gamma=call.gamma,
        drop_scale=call.drop_scale,
    )
    assert residual is not None  # with a branch there is one
    return residual


def backward(call: BackwardCall) -> tuple[torch.Tensor, ...]:
    _, dbranch, dgamma, _, _ = norm_triton.backward(
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


def variants(arch: Arch) -> list[Variant]:
    present = {
        "forward": {"x", "branch", "gamma", "drop", "residual"},
        "backward": {"grad_residual", "branch", "gamma", "drop", "dbranch", "dgamma"},
    }
    return norm_triton.variants(arch, norm_op.NONE, present)
