"""RMSNorm on the kernels of csrc/cpu/norm.h."""

from __future__ import annotations

from vitfast.ops.common import norm as norm_op
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend


def can_run(x, weight, eps, out_dtype, save_stats):
    return norm_op.reasons(x, weight, out_dtype=out_dtype)


def forward(x, weight, eps, out_dtype, save_stats):
    _, y, stats = norm_op.forward(
        norm_op.RMS, x, weight=weight, eps=eps, out_dtype=out_dtype, save_stats=save_stats
    )
    return y, norm_op.absent(x) if stats is None else stats


def backward(grad, x, weight, eps, stats):
    dx, _, _, dweight, _ = norm_op.backward(norm_op.RMS, grad, x, stats, weight=weight, eps=eps)
    return dx, dweight


BACKEND = Backend("cpu", forward, can_run, backward, native.reasons)
