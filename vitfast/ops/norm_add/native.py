"""Norm and residual connection on the kernels of csrc/cpu/norm.h."""

from __future__ import annotations

from vitfast.ops.common import norm as norm_op
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend


def can_run(x, branch, weight, bias, eps, drop_scale, norm, dtype, save_stats):
    return norm_op.reasons(x, branch, weight, bias, out_dtype=dtype)


def forward(x, branch, weight, bias, eps, drop_scale, norm, dtype, save_stats):
    _, y, stats = norm_op.forward(
        norm_op.KINDS[norm],
        branch,
        weight=weight,
        bias=bias,
        eps=eps,
        out_dtype=dtype,
        save_stats=save_stats,
        base=x,
        normed_scale=drop_scale,
    )
    return y, norm_op.absent(x) if stats is None else stats


def backward(grad, branch, weight, bias, eps, drop_scale, stats, norm):
    dbranch, _, _, dweight, dbias = norm_op.backward(
        norm_op.KINDS[norm],
        grad,
        branch,
        stats,
        weight=weight,
        bias=bias,
        eps=eps,
        normed_scale=drop_scale,
    )
    return dbranch, dweight, dbias


BACKEND = Backend("cpu", forward, can_run, backward, native.reasons)
