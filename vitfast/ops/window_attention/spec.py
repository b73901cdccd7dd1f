"""Samples and cost of `window_attention`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vitfast.ops.spec import Cost, OpSpec, Sample, randn, tensor_bytes
from vitfast.ops.window_attention.api import DISPATCHER, window_attention
from vitfast.ops.window_attention.reference import window_attention as reference

ODD, SMALL = ("odd",), ("odd", "small")


def _sample(
    name: str,
    size: tuple[int, int],
    window: tuple[int, int],
    heads: int,
    dim: int,
    *,
    shift: tuple[int, int] = (0, 0),
    batch: int = 1,
    bias: bool = True,
    pad: bool = False,
    cosine: bool = False,
    clamped: float = 0.0,
    tags: Sequence[str] = ODD,
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **options: Any,
) -> Sample:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        qkv = randn(g, batch, *size, 3, heads, dim, dtype=dtype)
        table = padding = scales = None
        if bias:
            rows = (2 * window[0] - 1) * (2 * window[1] - 1)
            table = randn(g, rows, heads, dtype=dtype, scale=0.5)
        if pad:
            padding = randn(g, 3, heads, dim, dtype=dtype)
        if cosine:
            # ln 4 to ln 11
            scales = torch.linspace(1.4, 2.4, heads, dtype=torch.float64, device="cpu").to(dtype)
            scales += clamped
        qkv = qkv if change is None else change(qkv)
        return (qkv, window, shift, table, padding, scales), dict(options)

    return Sample(name, make, frozenset(tags))


def _axes(qkv: torch.Tensor) -> torch.Tensor:
    """q and k along axes, so that their length is exact in every dtype, whatever the scale."""
    axes = torch.zeros_like(qkv)
    at = qkv.abs().argmax(-1, keepdim=True)
    axes.scatter_(-1, at, qkv.gather(-1, at).sign())
    axes[:, :, :, 2] = qkv[:, :, :, 2]
    return axes


def _strided(qkv: torch.Tensor) -> torch.Tensor:
    """Every stride but the last one other than a contiguous tensor's."""
    b, h, w, three, heads, dim = qkv.shape
    wide = qkv.new_zeros(b, w, h, heads, three, dim + 3)
    wide[..., :dim] = qkv.permute(0, 2, 1, 4, 3, 5)
    return wide[..., :dim].permute(0, 2, 1, 4, 3, 5)


REAL = (
    _sample("swin_tiny_224_stage1", (56, 56), (7, 7), 3, 32, tags=("real",)),
    _sample("swin_tiny_224_stage1_shifted", (56, 56), (7, 7), 3, 32, shift=(3, 3), tags=("real",)),
    _sample("swin_tiny_224_stage3_shifted", (14, 14), (7, 7), 12, 32, shift=(3, 3),
            tags=("real", "check")),
    _sample("swin_base_384_stage1_shifted", (96, 96), (12, 12), 4, 32, shift=(6, 6),
            tags=("real",)),
    _sample("maxvit_tiny_256_stage1_grid", (64, 64), (8, 8), 2, 32, grid=True, tags=("real",)),
    _sample("swinv2_tiny_256_stage1_shifted", (64, 64), (8, 8), 3, 32, shift=(4, 4), cosine=True,
            tags=("real",)),
    _sample("swinv2_base_256_w16_stage3", (16, 16), (16, 16), 16, 32, cosine=True,
            tags=("real", "check")),
)  # fmt: skip
SHAPES = (
    _sample("one_window", (4, 4), (4, 4), 2, 16, tags=("odd", "small", "check")),
    _sample("shifted", (8, 8), (4, 4), 2, 16, shift=(2, 2), tags=("odd", "small", "check")),
    _sample("padded", (9, 6), (4, 4), 2, 16, pad=True, tags=("odd", "small", "check")),
    _sample("padded_and_shifted", (9, 7), (4, 4), 2, 8, shift=(2, 1), pad=True, batch=2,
            tags=("odd", "small", "check")),
    _sample("padded_with_zeros", (5, 11), (4, 4), 1, 16, shift=(2, 2), tags=SMALL),
    _sample("pad_before_roll", (10, 7), (4, 4), 2, 8, shift=(2, 1), pad=True, roll_first=False,
            tags=("odd", "small", "check")),
    _sample("rectangular", (12, 10), (6, 5), 2, 8, shift=(3, 2), tags=SMALL),
    _sample("shift_of_one_axis", (8, 6), (4, 6), 2, 8, shift=(2, 0), tags=SMALL),
    _sample("grid", (8, 12), (4, 3), 2, 8, batch=2, grid=True, tags=("odd", "small", "check")),
    _sample("grid_of_one_window", (4, 4), (4, 4), 2, 8, grid=True, tags=SMALL),
    _sample("grid_window_9", (18, 9), (9, 9), 1, 8, grid=True),
    _sample("smaller_than_a_window", (3, 2), (4, 4), 2, 8, pad=True, shift=(1, 1), tags=SMALL),
    _sample("no_bias", (8, 8), (4, 4), 2, 8, shift=(2, 2), bias=False, tags=SMALL),
    _sample("no_bias_no_shift", (8, 4), (4, 4), 2, 8, bias=False, tags=SMALL),
    _sample("cosine", (8, 8), (4, 4), 3, 8, shift=(2, 2), cosine=True,
            tags=("odd", "small", "check")),
    _sample("cosine_padded", (6, 9), (4, 4), 2, 16, shift=(2, 2), cosine=True, pad=True,
            tags=SMALL),
    _sample("cosine_beyond_the_largest_scale", (8, 8), (4, 4), 2, 8, shift=(2, 2), cosine=True,
            clamped=3.0, change=_axes, tags=(*SMALL, "zero:logit_scale")),
    _sample("grid_strides", (8, 8), (4, 2), 2, 16, grid=True, change=_strided),
    _sample("strides", (9, 10), (4, 4), 2, 16, shift=(2, 2), pad=True, change=_strided),
    _sample("own_scale", (8, 8), (4, 4), 2, 16, scale=0.05),
    _sample("window_5_to_12", (10, 24), (5, 12), 2, 32, shift=(2, 6)),
    _sample("window_9", (9, 23), (9, 9), 1, 8, shift=(4, 4)),
    _sample("window_9_cosine", (9, 10), (9, 9), 1, 8, pad=True, cosine=True),
    _sample("window_14", (28, 15), (14, 14), 2, 32, shift=(7, 7), pad=True),
    _sample("window_24", (24, 30), (24, 24), 1, 32, shift=(12, 12), pad=True),
    _sample("window_32", (32, 32), (32, 32), 1, 16),
    # Tokens about 16, 32 and 64 queries and 96 keys.
    *(
        _sample(f"window_{h}_to_{w}", (h, 2 * w), (h, w), 1, 8, shift=(0, 1), tags=("odd", "tiles"))
        for h, w in ((3, 5), (1, 17), (3, 11), (7, 9), (8, 8), (5, 13), (5, 19), (8, 12), (1, 97),
                     (3, 43), (1, 193))
    ),
    *(_sample(f"head_dim_{d}", (7, 7), (7, 7), 2, d) for d in (1, 13, 24, 44, 64, 72, 96, 128)),
    _sample("empty_batch", (8, 8), (4, 4), 2, 16, batch=0, tags=("odd", "empty")),
)  # fmt: skip


def _cost(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cost:
    qkv, (h, w) = args[0], args[1]
    batch, high, wide, _, heads, dim = qkv.shape
    windows = -(-high // h) * -(-wide // w)
    flops = 4.0 * batch * windows * heads * (h * w) ** 2 * dim
    extras = (t for t in args[2:] if isinstance(t, torch.Tensor))
    return Cost(flops=flops, bytes=tensor_bytes(qkv, *extras) + tensor_bytes(qkv) / 3)


SPEC = OpSpec(
    name="window_attention",
    public=window_attention,
    reference=reference,
    dispatcher=DISPATCHER,
    cost=_cost,
    rms_factor=2.0,  # these as for attention
    backward_factor=4.0,
    samples=REAL + SHAPES,
)
