"""RMSNorm as calls of the norm kernels, the CPU's or Triton's."""

from __future__ import annotations

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common.norm import Kernels
from vitfast.ops.rms_norm.reference import Call


def forward(kernels: Kernels, call: Call) -> tuple[torch.Tensor, ...]:
    _, y, stats = kernels.forward(
        norm_op.RMS,
        call.x,
        weight=call.weight,
        eps=call.eps,
        out_dtype=call.out_dtype,
        save_stats=call.save_stats,
    )
    return norm_op.filled(call.x, y, stats)


def backward(
    kernels: Kernels, grad: torch.Tensor, call: Call, stats: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    dx, _, _, dweight, _ = kernels.backward(
        norm_op.RMS, grad, call.x, stats, weight=call.weight, eps=call.eps
    )
    return dx, dweight
