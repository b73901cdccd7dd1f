"""Gathering patches and their norm on the kernels of csrc/cpu/norm.h."""

from __future__ import annotations

from vitfast.ops.common import norm as norm_op
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend


def can_run(x, weight, bias, eps, norm, out_dtype, save_stats):
    return norm_op.reasons(x, weight, bias, out_dtype=out_dtype)


def forward(x, weight, bias, eps, norm, out_dtype, save_stats):
    gathered, normed, stats = norm_op.forward(
        norm_op.NONE if norm is None else norm_op.KINDS[norm],
        x,
        weight=weight,
        bias=bias,
        eps=eps,
        out_dtype=out_dtype,
        save_stats=save_stats and norm is not None,
        merge=True,
    )
    y = gathered if norm is None else normed
    return y, norm_op.absent(x) if stats is None else stats


def backward(grad, x, weight, bias, eps, stats, norm):
    gathered = norm is None
    dx, _, _, dweight, dbias = norm_op.backward(
        norm_op.NONE if gathered else norm_op.KINDS[norm],
        None if gathered else grad,
        x,
        stats,
        grad_residual=grad if gathered else None,
        weight=weight,
        bias=bias,
        eps=eps,
        merge=True,
    )
    return dx, dweight, dbias


BACKEND = Backend("cpu", forward, can_run, backward, native.reasons)
