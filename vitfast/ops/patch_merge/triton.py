"""Gathering patches and their norm on the kernels of vitfast/ops/common/norm_triton_kernels.py."""

from __future__ import annotations

from dataclasses import replace

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common import norm_triton
from vitfast.runtime.launches import Arch, Variant


def forward(x, weight, bias, eps, norm, out_dtype, save_stats):
    gathered, normed, stats = norm_triton.forward(
        norm_op.NONE if norm is None else norm_op.KINDS[norm], x, weight=weight, bias=bias, eps=eps,
        out_dtype=out_dtype, save_stats=save_stats, merge=True,
    )  # fmt: skip
    y = gathered if norm is None else normed
    return y, norm_op.absent(x) if stats is None else stats


def backward(grad, x, weight, bias, eps, stats, norm):
    gathered = norm is None
    dx, _, _, dweight, dbias = norm_triton.backward(
        norm_op.NONE if gathered else norm_op.KINDS[norm], None if gathered else grad, x, stats,
        grad_residual=grad if gathered else None, weight=weight, bias=bias, eps=eps, merge=True,
    )  # fmt: skip
    return dx, dweight, dbias


_WIDTHS = (384, 1024, 3072)
"""Four times the width of a stage of Swin: its narrowest, a common one, its widest."""


def variants(arch: Arch) -> list[Variant]:
    normed = {
        "forward": {"x", "weight", "bias", "normed", "stats"},
        "backward": {"grad", "residual", "weight", "stats", "dx", "dweight", "dbias"},
    }
    gathered = {"forward": {"x", "residual"}, "backward": {"grad_residual", "dx"}}
    return [
        *norm_triton.variants(arch, norm_op.LAYER, normed, _WIDTHS, merge=True),
        *(
            replace(v, name=f"gather-{v.name}")
            for v in norm_triton.variants(arch, norm_op.NONE, gathered, _WIDTHS, merge=True)
        ),
    ]
