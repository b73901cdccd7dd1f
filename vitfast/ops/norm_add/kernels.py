"""Norm and residual connection as calls of the norm kernels, the CPU's or Triton's."""

from __future__ import annotations

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common.norm import Kernels
from vitfast.ops.norm_add.reference import Call


def forward(kernels: Kernels, call: Call) -> tuple[torch.Tensor, ...]:
    _, y, stats = kernels.forward(
        norm_op.KINDS[call.norm],
        call.branch,
        weight=call.weight,
        bias=call.bias,
        eps=call.eps,
        out_dtype=call.dtype,
        save_stats=call.save_stats,
        base=call.x,
        normed_scale=call.drop_scale,
    )
    return norm_op.filled(call.x, y, stats)


def backward(
    kernels: Kernels, grad: torch.Tensor, call: Call, stats: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    dbranch, _, _, dweight, dbias = kernels.backward(
        norm_op.KINDS[call.norm],
        grad,
        call.branch,
        stats,
        weight=call.weight,
        bias=call.bias,
        eps=call.eps,
        normed_scale=call.drop_scale,
    )
    return dbranch, dweight, dbias
