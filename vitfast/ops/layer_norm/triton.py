"""LayerNorm on the kernels of vitfast/ops/common/norm_triton_kernels.py."""

from __future__ import annotations

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common import norm_triton
from vitfast.runtime.launches import Arch, Variant


def forward(x, weight, bias, eps, out_dtype, save_stats):
    _, y, stats = norm_triton.forward(
        norm_op.LAYER, x, weight=weight, bias=bias, eps=eps, out_dtype=out_dtype,
        save_stats=save_stats,
    )  # fmt: skip
    return y, norm_op.absent(x) if stats is None else stats


def backward(grad, x, weight, bias, eps, stats):
    dx, _, _, dweight, dbias = norm_triton.backward(
        norm_op.LAYER, grad, x, stats, weight=weight, bias=bias, eps=eps
    )
    return dx, dweight, dbias


def variants(arch: Arch) -> list[Variant]:
    present = {
        "forward": {"x", "weight", "bias", "normed", "stats"},
        "backward": {"grad", "residual", "weight", "stats", "dx", "dweight", "dbias"},
    }
    return norm_triton.variants(arch, norm_op.LAYER, present)
