"""Samples and cost of `group_norm_act`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vitfast.ops.group_norm_act.api import DISPATCHER, group_norm_act
from vitfast.ops.group_norm_act.reference import group_norm_act as reference
from vitfast.ops.spec import Cost, OpSpec, Sample, randn, tensor_bytes

LAST = torch.channels_last


def _sample(
    name: str,
    *shape: int,
    groups: int = 32,
    tags: Sequence[str] = ("odd",),
    eps: float = 1e-5,
    act: str = "relu",
    residual: bool = False,
    last: bool = True,
    affine: bool = True,
    affine_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **kwargs: Any,
) -> Sample:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = randn(g, *shape, dtype=dtype)
        if last:
            x = x.to(memory_format=LAST)
        if change is not None:
            x = change(x)
        weight = bias = None
        if affine:
            weight = 1 + randn(g, x.shape[1], dtype=affine_dtype or dtype, scale=0.1)
            bias = randn(g, x.shape[1], dtype=affine_dtype or dtype, scale=0.1)
        extra = {}
        if residual:
            extra["residual"] = randn(g, *x.shape, dtype=residual_dtype or dtype)
            if last:
                extra["residual"] = extra["residual"].to(memory_format=LAST)
        return (x, groups, weight, bias, eps), {"act": act, **extra, **kwargs}

    return Sample(name, make, frozenset(tags))


def _outlier(x: torch.Tensor) -> torch.Tensor:
    x[:, :2] *= 50
    return x


def _far(x: torch.Tensor) -> torch.Tensor:
    away = torch.arange(1, 1 + x.shape[1], device="cpu").to(x.dtype).view(-1, 1, 1)
    return x + (512 * away if x.dtype == torch.bfloat16 else 4096 * away)


def _constant_group(x: torch.Tensor) -> torch.Tensor:
    x[1:, :4] = x[1:, :1, :1, :1]
    return x


def _cost(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cost:
    x, _, weight, bias = args[:4]
    residual = kwargs.get("residual")
    y = x.numel() * (kwargs.get("out_dtype") or x.dtype).itemsize
    return Cost(flops=9.0 * x.numel(), bytes=tensor_bytes(x, residual, weight, bias) + y)


SPEC = OpSpec(
    name="group_norm_act",
    public=group_norm_act,
    reference=reference,
    dispatcher=DISPATCHER,
    cost=_cost,
    samples=(
        _sample("r26_stage1_norm1", 1, 64, 56, 56, tags=("real", "check")),
        _sample("r26_stage1_norm3", 1, 256, 56, 56, tags=("real",), residual=True),
        _sample("r26_stage3_norm2", 1, 256, 14, 14, tags=("real",)),
        _sample("r26_stage3_norm3", 1, 1024, 14, 14, tags=("real", "check"), residual=True),
        _sample("r26_stage4_norm3", 2, 2048, 7, 7, tags=("real",), residual=True),
        _sample("r50_stage2_downsample", 2, 512, 28, 28, tags=("real",), act="none"),
        _sample("r50_stem_384", 1, 64, 192, 192, tags=("real",)),
        _sample("r50_stage1_contiguous", 2, 256, 56, 56, tags=("real",), last=False),
        _sample("r50_stage1_norm3_b32", 32, 256, 56, 56, tags=("real", "large"), residual=True),
        _sample("odd_sizes", 2, 6, 5, 7, groups=3, tags=("odd", "small", "check"), residual=True),
        _sample("odd_contiguous", 2, 6, 5, 7, groups=3, tags=("odd", "small", "check"), last=False,
                residual=True),
        _sample("no_act", 3, 8, 3, 4, groups=2, tags=("odd", "small"), act="none", residual=True),
        _sample("no_affine", 2, 4, 4, 5, groups=2, tags=("odd", "small"), affine=False),
        _sample("one_group", 2, 13, 9, 11, groups=1),
        _sample("a_group_each", 2, 17, 9, 11, groups=17),
        _sample("a_group_each_contiguous", 2, 17, 9, 11, groups=17, last=False),
        _sample("width_67", 3, 67, 6, 6, groups=1, residual=True),
        _sample("pixels_2049", 2, 6, 3, 683, groups=3, last=False, residual=True),
        _sample("pixels_last_2049", 2, 6, 3, 683, groups=3, residual=True),
        _sample("many_parts", 2, 18, 53, 43, groups=2, residual=True),
        _sample("many_parts_contiguous", 2, 18, 53, 43, groups=2, last=False, residual=True),
        _sample("many_parts_offset", 1, 8, 71, 61, groups=2, change=lambda x: x + 30),
        _sample("wide_group", 1, 600, 7, 9, groups=1, tags=("odd",)),
        _sample("padded_groups", 2, 15, 5, 7, groups=5, residual=True),
        _sample("one_pixel", 3, 64, 1, 1, groups=4),
        _sample("one_line", 2, 24, 1, 19, groups=4),
        _sample("one_column", 2, 24, 19, 1, groups=4),
        _sample("one_column_contiguous", 2, 24, 19, 1, groups=4, last=False),
        _sample("one_channel", 2, 1, 9, 10, groups=1),
        _sample("to_bfloat16", 2, 48, 6, 6, groups=8, tags=("odd", "check"),
                out_dtype=torch.bfloat16),
        _sample("to_float32", 2, 48, 6, 6, groups=8, out_dtype=torch.float32, residual=True),
        _sample("float32_weights", 2, 48, 6, 6, groups=8, affine_dtype=torch.float32),
        _sample("float32_residual", 2, 48, 6, 6, groups=8, residual=True,
                residual_dtype=torch.float32),
        _sample("cropped", 2, 24, 9, 9, groups=4, change=lambda x: x[:, :, 1:8, 2:]),
        _sample("cropped_contiguous", 2, 24, 9, 9, groups=4, last=False,
                change=lambda x: x[:, :, 1:8, 2:]),
        _sample("crossed", 2, 24, 5, 7, groups=4, change=lambda x: x.transpose(2, 3)),
        _sample("crossed_contiguous", 2, 24, 5, 7, groups=4, last=False, residual=True,
                change=lambda x: x.transpose(2, 3)),
        _sample("some_channels", 2, 48, 5, 7, groups=4, change=lambda x: x[:, 4:28]),
        _sample("expanded", 1, 24, 5, 7, groups=4, change=lambda x: x.expand(3, 24, 5, 7)),
        _sample("outlier_channels", 2, 64, 14, 14, change=_outlier),
        _sample("offset", 2, 64, 14, 14, change=lambda x: x + 30),
        _sample("offset_contiguous", 2, 64, 14, 14, last=False, change=lambda x: x + 30),
        # Far from zero by more than what float32 leaves of a square; each channel by another.
        *(
            _sample(f"far_{name}", 2, 8, *size, groups=4, last=last, act="none", change=_far,
                    tags=("odd", "tiles"))
            for name, size, last in (
                ("pixels_7", (1, 7), True),
                ("pixels_9", (3, 3), True),
                ("pixels_133", (7, 19), True),
                ("contiguous_63", (7, 9), False),
                ("contiguous_133", (7, 19), False),
            )
        ),
        _sample("constant_group", 2, 16, 5, 5, groups=4, act="none", change=_constant_group),
        _sample("empty", 0, 16, 4, 4, groups=4, tags=("odd", "empty")),
        _sample("no_pixels", 2, 16, 0, 4, groups=4, tags=("odd", "empty")),
    ),
)  # fmt: skip
