"""Residual connection and norm as calls of the norm kernels, the CPU's or Triton's."""

from __future__ import annotations

import torch

from vitfast.ops.add_norm.reference import BackwardCall, Call
from vitfast.ops.common import norm as norm_op
from vitfast.ops.common.norm import Kernels


def forward(kernels: Kernels, call: Call) -> tuple[torch.Tensor, ...]:
    outputs = kernels.forward(
        norm_op.KINDS[call.norm],
        call.x,
        branch=call.branch,
        gamma=call.gamma,
        drop_scale=call.drop_scale,
        weight=call.weight,
        bias=call.bias,
        eps=call.eps,
        out_dtype=call.out_dtype,
        save_stats=call.save_stats,
    )
    return norm_op.filled(call.x, *outputs)


def backward(kernels: Kernels, call: BackwardCall) -> tuple[torch.Tensor, ...]:
    return kernels.backward(
        norm_op.KINDS[call.norm],
        call.grad_normed,
        call.residual,
        call.stats,
        grad_residual=call.grad_residual,
        branch=call.branch,
        gamma=call.gamma,
        drop_scale=call.drop_scale,
        weight=call.weight,
        bias=call.bias,
        eps=call.eps,
        x_dtype=call.x_dtype,
        branch_dtype=call.branch_dtype,
    )
