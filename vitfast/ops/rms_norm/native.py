"""RMSNorm on the kernels of csrc/cpu/norm.h."""

from __future__ import annotations

from vitfast.ops import _norm
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend


def can_run(x, weight, eps, out_dtype, save_stats):
    return _norm.reasons(x, weight, out_dtype=out_dtype)


def forward(x, weight, eps, out_dtype, save_stats):
    _, y, stats = _norm.forward(
        _norm.RMS, x, weight=weight, eps=eps, out_dtype=out_dtype, save_stats=save_stats
    )
    return y, _norm.absent(x) if stats is None else stats


def backward(grad, x, weight, eps, stats):
    dx, _, _, dweight, _ = _norm.backward(_norm.RMS, grad, x, stats, weight=weight, eps=eps)
    return dx, dweight


BACKEND = Backend("cpu", forward, can_run, backward, native.reasons)
