"""Gathering patches and their norm on the kernels of csrc/cpu/norm.h."""

from __future__ import annotations

from vitfast.ops import _norm
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend


def can_run(x, weight, bias, eps, norm, out_dtype, save_stats):
    return _norm.reasons(x, weight, bias, out_dtype=out_dtype)


def forward(x, weight, bias, eps, norm, out_dtype, save_stats):
    gathered, normed, stats = _norm.forward(
        _norm.NONE if norm is None else _norm.KINDS[norm],
        x,
        weight=weight,
        bias=bias,
        eps=eps,
        out_dtype=out_dtype,
        save_stats=save_stats and norm is not None,
        merge=True,
    )
    y = gathered if norm is None else normed
    return y, _norm.absent(x) if stats is None else stats


def backward(grad, x, weight, bias, eps, stats, norm):
    gathered = norm is None
    dx, _, _, dweight, dbias = _norm.backward(
        _norm.NONE if gathered else _norm.KINDS[norm],
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
