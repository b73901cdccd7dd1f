"""RMSNorm on the kernels of vitfast/ops/common/norm_triton_kernels.py."""

from __future__ import annotations

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common import norm_triton
from vitfast.runtime.launches import Arch, Variant


def forward(x, weight, eps, out_dtype, save_stats):
    _, y, stats = norm_triton.forward(
        norm_op.RMS, x, weight=weight, eps=eps, out_dtype=out_dtype, save_stats=save_stats
    )
    return y, norm_op.absent(x) if stats is None else stats


def backward(grad, x, weight, eps, stats):
    dx, _, _, dweight, _ = norm_triton.backward(norm_op.RMS, grad, x, stats, weight=weight, eps=eps)
    return dx, dweight


def variants(arch: Arch) -> list[Variant]:
    present = {
        "forward": {"x", "weight", "normed", "stats"},
        "backward": {"grad", "residual", "weight", "stats", "dx", "dweight"},
    }
    return norm_triton.variants(arch, norm_op.RMS, present)
