"""LayerNorm on the kernels of csrc/cpu/norm.h."""

from __future__ import annotations

from vitfast.ops import _norm
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend


def can_run(x, weight, bias, eps, out_dtype, save_stats):
    return _norm.reasons(x, weight, bias, out_dtype=out_dtype)


def forward(x, weight, bias, eps, out_dtype, save_stats):
    _, y, stats = _norm.forward(
        _norm.LAYER,
        x,
        weight=weight,
        bias=bias,
        eps=eps,
        out_dtype=out_dtype,
        save_stats=save_stats,
    )
    return y, _norm.absent(x) if stats is None else stats


def backward(grad, x, weight, bias, eps, stats):
    dx, _, _, dweight, dbias = _norm.backward(
        _norm.LAYER, grad, x, stats, weight=weight, bias=bias, eps=eps
    )
    return dx, dweight, dbias


BACKEND = Backend("cpu", forward, can_run, backward, native.reasons)
