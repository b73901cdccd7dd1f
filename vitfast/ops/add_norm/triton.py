"""Residual connection and norm on the kernels of vitfast/ops/common/norm_triton_kernels.py."""

from __future__ import annotations

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common import norm_triton
from vitfast.runtime.launches import Arch, Variant


def forward(x, branch, weight, bias, eps, gamma, drop_scale, norm, out_dtype, save_stats):
    residual, normed, stats = norm_triton.forward(
        norm_op.KINDS[norm], x, branch=branch, gamma=gamma, drop_scale=drop_scale, weight=weight,
        bias=bias, eps=eps, out_dtype=out_dtype, save_stats=save_stats,
    )  # fmt: skip
    return residual, normed, norm_op.absent(x) if stats is None else stats


def backward(
    grad_residual, grad_normed, residual, branch, weight, bias, eps, gamma, drop_scale, stats, norm,
    x_dtype, branch_dtype,
):  # fmt: skip
    return norm_triton.backward(
        norm_op.KINDS[norm], grad_normed, residual, stats, grad_residual=grad_residual,
        branch=branch, gamma=gamma, drop_scale=drop_scale, weight=weight, bias=bias, eps=eps,
        x_dtype=x_dtype, branch_dtype=branch_dtype,
    )  # fmt: skip


def variants(arch: Arch) -> list[Variant]:
    """With LayerScale and DropPath: what holds the most registers."""
    forward = {"x", "branch", "gamma", "drop", "weight", "bias", "residual", "normed", "stats"}
    backward = {
        "grad", "grad_residual", "residual", "branch", "gamma", "drop", "weight", "stats", "dx",
        "dbranch", "dgamma", "dweight", "dbias",
    }  # fmt: skip
    return norm_triton.variants(arch, norm_op.LAYER, {"forward": forward, "backward": backward})
