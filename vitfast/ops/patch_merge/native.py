"""Gathering patches and their norm on the kernels of csrc/cpu/norm.h."""

from __future__ import annotations

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.patch_merge.reference import Call
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend


def can_run(call: Call) -> list[str]:
    return norm_op.reasons(call.x, call.weight, call.bias, out_dtype=call.out_dtype)


def forward(call: Call) -> tuple[torch.Tensor, ...]:
    gathered, normed, stats = norm_op.forward(
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


def backward(grad: torch.Tensor, call: Call, stats: torch.Tensor) -> tuple[torch.Tensor, ...]:
    gathered = call.norm is None
    dx, _, _, dweight, dbias = norm_op.backward(
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


BACKEND = Backend("cpu", forward, can_run, backward, native.reasons)
