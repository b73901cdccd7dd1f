"""Small arguments that each op accepts, of which tests make worse ones."""

from __future__ import annotations

import torch

import vitfast.ops as ops
from vitfast.ops.varlen_attention.spec import cumulative


def good(op: str) -> dict[str, object]:
    """Valid arguments of every op."""
    g = torch.Generator().manual_seed(0)

    def t(*shape):
        return torch.randn(*shape, generator=g)

    return {
        "layer_norm": lambda: {"x": t(2, 5, 8), "weight": t(8), "bias": t(8)},
        "rms_norm": lambda: {"x": t(2, 5, 8), "weight": t(8)},
        "add_norm": lambda: {
            "x": t(2, 5, 8), "branch": t(2, 5, 8), "weight": t(8), "bias": t(8), "gamma": t(8),
            "drop_scale": t(2).abs(),
        },
        "norm_add": lambda: {
            "x": t(2, 5, 8), "branch": t(2, 5, 8), "weight": t(8), "bias": t(8),
            "drop_scale": t(2).abs(),
        },
        "residual_add": lambda: {
            "x": t(2, 5, 8), "branch": t(2, 5, 8), "gamma": t(8), "drop_scale": t(2).abs(),
        },
        "attention": lambda: {n: t(2, 5, 3, 8) for n in ("q", "k", "v")},
        "varlen_attention": lambda: {
            **{n: t(7, 3, 8) for n in ("q", "k", "v")}, "cu_seqlens": cumulative([2, 5]),
        },
        "linear_act": lambda: {"x": t(2, 5, 8), "weight": t(6, 8), "bias": t(6), "act": "gelu"},
        "mlp": lambda: {"x": t(2, 5, 8), "weight1": t(6, 8), "bias1": t(6), "weight2": t(4, 6),
                        "bias2": t(4), "act": "gelu"},
        "patch_embed": lambda: {
            "image": t(2, 3, 8, 12), "weight": t(6, 3, 4, 4), "bias": t(6),
            "pos_embed": t(1, 6, 6), "prefix": t(1, 1, 6),
        },
        "patch_merge": lambda: {"x": t(2, 5, 6, 8), "weight": t(32), "bias": t(32)},
        "dwconv_norm": lambda: {
            "x": t(2, 5, 6, 8), "weight": t(8, 1, 3, 5), "bias": t(8), "norm_weight": t(8),
            "norm_bias": t(8),
        },
        "group_norm_act": lambda: {
            "x": t(2, 8, 5, 6), "groups": 4, "weight": t(8), "bias": t(8),
            "residual": t(2, 8, 5, 6), "act": "relu",
        },
        "window_attention": lambda: {
            "qkv": t(2, 9, 6, 3, 2, 8), "table": t(49, 2), "pad": t(3, 2, 8), "logit_scale": t(2),
            "window": (4, 4), "shift": (2, 2),
        },
        "grn": lambda: {"x": t(2, 5, 6, 8), "weight": t(8), "bias": t(8)},
    }[op]()  # fmt: skip


OPS = ops.NAMES
TENSORS = [
    (op, name)
    for op in OPS
    for name, v in good(op).items()
    if isinstance(v, torch.Tensor) and v.is_floating_point()
]
