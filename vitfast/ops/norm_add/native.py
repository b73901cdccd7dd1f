"""Norm and residual connection on the kernels of csrc/cpu/norm.h."""

from __future__ import annotations

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.norm_add.reference import Call
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend


def can_run(call: Call) -> list[str]:
    return norm_op.reasons(call.x, call.branch, call.weight, call.bias, out_dtype=call.dtype)


def forward(call: Call) -> tuple[torch.Tensor, ...]:
    _, y, stats = norm_op.forward(
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


def backward(grad: torch.Tensor, call: Call, stats: torch.Tensor) -> tuple[torch.Tensor, ...]:
    dbranch, _, _, dweight, dbias = norm_op.backward(
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


BACKEND = Backend("cpu", forward, can_run, backward, native.reasons)
