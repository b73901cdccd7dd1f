"""LayerNorm on the kernels of csrc/cpu/norm.h."""

from __future__ import annotations

from vitfast.ops.common import norm as norm_op
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend


def can_run(x, weight, bias, eps, out_dtype, save_stats):
    return norm_op.reasons(x, weight, bias, out_dtype=out_dtype)


def forward(x, weight, bias, eps, out_dtype, save_stats):
    _, y, stats = norm_op.forward(
        norm_op.LAYER,
        x,
        weight=weight,
        bias=bias,
        eps=eps,
        out_dtype=out_dtype,
        save_stats=save_stats,
    )
    return y, norm_op.absent(x) if stats is None else stats


def backward(grad, x, weight, bias, eps, stats):
    dx, _, _, dweight, dbias = norm_op.backward(
        norm_op.LAYER, grad, x, stats, weight=weight, bias=bias, eps=eps
    )
    return dx, dweight, dbias


BACKEND = Backend("cpu", forward, can_run, backward, native.reasons)
