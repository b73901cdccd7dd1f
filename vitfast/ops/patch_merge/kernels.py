"""Gathering patches and their norm as calls of the norm kernels, the CPU's or Triton's."""

from __future__ import annotations

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common.norm import Kernels
from vitfast.ops.patch_merge.reference import Call


def forward(kernels: Kernels, call: Call) -> tuple[torch.Tensor, ...]:
    gathered, normed, stats = kernels.forward(
        norm_op.NONE if call.norm is None else norm_op.KINDS[call.norm],
        call.x,
        weight=call.weight,
        bias=call.bias,
        eps=call.eps,
        out_dtype=call.out_dtype,
        save_stats=call.save_stats and call.norm is not None,
        merge=True,
    )
    return norm_op.filled(call.x, gathered if call.norm is None else normed, stats)


def backward(
    kernels: Kernels, grad: torch.Tensor, call: Call, stats: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    gathered = call.norm is None
    dx, _, _, dweight, dbias = kernels.backward(
        norm_op.NONE if call.norm is None else norm_op.KINDS[call.norm],
        None if gathered else grad,
        call.x,
        stats,
        grad_residual=grad if gathered else None,
        weight=call.weight,
        bias=call.bias,
        eps=call.eps,
        merge=True,
    )
    return dx, dweight, dbias
