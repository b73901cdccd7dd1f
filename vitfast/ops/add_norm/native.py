"""Residual connection and norm on the kernels of csrc/cpu/norm.h."""

from __future__ import annotations

import torch

from vitfast.ops.add_norm.reference import BackwardCall, Call
from vitfast.ops.common import norm as norm_op
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend


def can_run(call: Call) -> list[str]:
    return norm_op.reasons(
        call.x, call.branch, call.weight, call.bias, call.gamma, out_dtype=call.out_dtype
    )


def forward(call: Call) -> tuple[torch.Tensor, ...]:
    outputs = norm_op.forward(
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


def backward(call: BackwardCall) -> tuple[torch.Tensor, ...]:
    return norm_op.backward(
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


BACKEND = Backend("cpu", forward, can_run, backward, native.reasons)
