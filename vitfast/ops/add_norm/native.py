"""Residual connection and norm on the kernels of csrc/cpu/norm.h."""

from __future__ import annotations

from vitfast.ops.common import norm as norm_op
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend


def can_run(x, branch, weight, bias, eps, gamma, drop_scale, norm, out_dtype, save_stats):
    return norm_op.reasons(x, branch, weight, bias, gamma, out_dtype=out_dtype)


def forward(x, branch, weight, bias, eps, gamma, drop_scale, norm, out_dtype, save_stats):
    residual, normed, stats = norm_op.forward(
        norm_op.KINDS[norm],
        x,
        branch=branch,
        gamma=gamma,
        drop_scale=drop_scale,
        weight=weight,
        bias=bias,
        eps=eps,
        out_dtype=out_dtype,
        save_stats=save_stats,
    )
    return residual, normed, norm_op.absent(x) if stats is None else stats


def backward(
    grad_residual, grad_normed, residual, branch, weight, bias, eps, gamma, drop_scale, stats, norm,
    x_dtype, branch_dtype,
):  # fmt: skip
    return norm_op.backward(
        norm_op.KINDS[norm],
        grad_normed,
        residual,
        stats,
        grad_residual=grad_residual,
        branch=branch,
        gamma=gamma,
        drop_scale=drop_scale,
        weight=weight,
        bias=bias,
        eps=eps,
        x_dtype=x_dtype,
        branch_dtype=branch_dtype,
    )


BACKEND = Backend("cpu", forward, can_run, backward, native.reasons)
