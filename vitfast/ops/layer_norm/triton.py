"""LayerNorm on the kernels of vitfast/ops/_norm_triton.py."""

from __future__ import annotations

from vitfast.ops import _norm, _norm_triton
from vitfast.runtime.tuning import Arch, Variant


def forward(x, weight, bias, eps, out_dtype, save_stats):
    _, y, stats = _norm_triton.forward(
        _norm.LAYER, x, weight=weight, bias=bias, eps=eps, out_dtype=out_dtype,
        save_stats=save_stats,
    )  # fmt: skip
    return y, _norm.absent(x) if stats is None else stats


def backward(grad, x, weight, bias, eps, stats):
    dx, _, _, dweight, dbias = _norm_triton.backward(
        _norm.LAYER, grad, x, stats, weight=weight, bias=bias, eps=eps
    )
    return dx, dweight, dbias


def variants(arch: Arch) -> list[Variant]:
    present = {
        "forward": {"x", "weight", "bias", "normed", "stats"},
        "backward": {"grad", "residual", "weight", "stats", "dx", "dweight", "dbias"},
    }
    return _norm_triton.variants(arch, _norm.LAYER, present)
