"""RMSNorm on the kernels of csrc/cpu/norm.h."""

from __future__ import annotations

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.rms_norm.reference import Call
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend


def can_run(call: Call) -> list[str]:
    return norm_op.reasons(call.x, call.weight, out_dtype=call.out_dtype)


def forward(call: Call) -> tuple[torch.Tensor, ...]:
    _, y, stats = norm_op.forward(
        norm_op.RMS,
        call.x,
        weight=call.weight,
        eps=call.eps,
        out_dtype=call.out_dtype,
        save_stats=call.save_stats,
    )
    return norm_op.filled(call.x, y, stats)


def backward(grad: torch.Tensor, call: Call, stats: torch.Tensor) -> tuple[torch.Tensor, ...]:
    dx, _, _, dweight, _ = norm_op.backward(
        norm_op.RMS, grad, call.x, stats, weight=call.weight, eps=call.eps
    )
    return dx, dweight


BACKEND = Backend("cpu", forward, can_run, backward, native.reasons)
