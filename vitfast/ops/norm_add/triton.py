"""Norm and residual connection on the kernels of vitfast/ops/common/norm_triton_kernels.py."""

from __future__ import annotations

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common import norm_triton
from vitfast.runtime.launches import Arch, Variant


def forward(x, branch, weight, bias, eps, drop_scale, norm, dtype, save_stats):
    _, y, stats = norm_triton.forward(
        norm_op.KINDS[norm], branch, weight=weight, bias=bias, eps=eps, out_dtype=dtype,
        save_stats=save_stats, base=x, normed_scale=drop_scale,
    )  # fmt: skip
    return y, norm_op.absent(x) if stats is None else stats


def backward(grad, branch, weight, bias, eps, drop_scale, stats, norm):
    dbranch, _, _, dweight, dbias = norm_triton.backward(
        norm_op.KINDS[norm], grad, branch, stats, weight=weight, bias=bias, eps=eps,
        normed_scale=drop_scale,
    )  # fmt: skip
    return dbranch, dweight, dbias


_WIDTHS = (96, 384, 1536)
"""Of Swin V2: its narrowest, its commonest, its widest."""


def variants(arch: Arch) -> list[Variant]:
    """With DropPath: what holds the most registers."""
    present = {
        "forward": {"x", "weight", "bias", "base", "scale", "normed", "stats"},
        "backward": {"grad", "residual", "weight", "scale", "stats", "dx", "dweight", "dbias"},
    }
    return norm_triton.variants(arch, norm_op.LAYER, present, _WIDTHS)
