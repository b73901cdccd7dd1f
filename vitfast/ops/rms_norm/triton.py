"""RMSNorm on the kernels of vitfast/ops/_norm_triton.py."""

from __future__ import annotations

from vitfast.ops import _norm, _norm_triton
from vitfast.runtime.tuning import Arch, Variant


def forward(x, weight, eps, out_dtype, save_stats):
    _, y, stats = _norm_triton.forward(
        _norm.RMS, x, weight=weight, eps=eps, out_dtype=out_dtype, save_stats=save_stats
    )
    return y, _norm.absent(x) if stats is None else stats


def backward(grad, x, weight, eps, stats):
    dx, _, _, dweight, _ = _norm_triton.backward(_norm.RMS, grad, x, stats, weight=weight, eps=eps)
    return dx, dweight


def variants(arch: Arch) -> list[Variant]:
    present = {
        "forward": {"x", "weight", "normed", "stats"},
        "backward": {"grad", "residual", "weight", "stats", "dx", "dweight"},
    }
    return _norm_triton.variants(arch, _norm.RMS, present)
