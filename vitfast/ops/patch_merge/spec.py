"""Samples and cost of `patch_merge`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from vitfast.ops.common.norm import merged_shape
from vitfast.ops.patch_merge.api import DISPATCHER, patch_merge
from vitfast.ops.patch_merge.reference import patch_merge as reference
from vitfast.ops.spec import (
    Arguments,
    Cost,
    OpSpec,
    Sample,
    affine,
    outlier_channels,
    randn,
    tensor_bytes,
)


def _sample(
    name: str,
    *shape: int,
    tags: tuple[str, ...] = ("odd",),
    has_affine: bool = True,
    norm: str | None = "layer",
    affine_dtype: torch.dtype | None = None,
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **kwargs: Any,
) -> Sample:
    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        x = randn(g, *shape, dtype=dtype)
        if change is not None:
            x = change(x)
        weight = bias = None
        if has_affine and norm is not None:
            weight, bias = affine(g, 4 * x.shape[-1], affine_dtype or dtype, norm)
        return (x, weight, bias, 1e-5), {"norm": norm, **kwargs}

    return Sample(name, make, frozenset(tags))


def _cost(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cost:
    x, weight, bias = args[:3]
    elements = math.prod(merged_shape(x))
    dtype = kwargs.get("out_dtype") or x.dtype
    return Cost(
        flops=(1.0 if kwargs["norm"] is None else 8.0) * elements,
        bytes=tensor_bytes(x, weight, bias) + elements * dtype.itemsize,
    )


SPEC = OpSpec(
    name="patch_merge",
    public=patch_merge,
    reference=reference,
    dispatcher=DISPATCHER,
    cost=_cost,
    samples=(
        _sample("swin_tiny_merge1", 1, 56, 56, 96, tags=("real", "check")),
        _sample("swin_base_merge2", 1, 28, 28, 256, tags=("real", "check")),
        _sample("swin_large_merge3_384", 2, 24, 24, 768, tags=("real",)),
        _sample("swin_base_merge2_autocast", 4, 28, 28, 256, tags=("real",),
                out_dtype=torch.bfloat16),
        _sample("swinv2_tiny_merge1", 1, 64, 64, 96, tags=("real", "check"), norm=None),
        _sample("swin_tiny_merge1_4k", 1, 540, 960, 96, tags=("real", "large")),
        _sample("odd_sizes", 2, 5, 7, 13, tags=("odd", "small", "check")),
        _sample("gathered", 2, 3, 6, 5, tags=("odd", "small", "check"), norm=None),
        _sample("rms_small", 2, 4, 3, 5, tags=("odd", "small"), norm="rms"),
        _sample("no_affine", 1, 4, 6, 7, tags=("odd", "small"), has_affine=False),
        _sample("even_sizes", 3, 6, 8, 24),
        _sample("odd_height", 2, 7, 8, 32),
        _sample("odd_width", 2, 8, 7, 32),
        _sample("one_pixel", 3, 1, 1, 16),
        _sample("one_line", 2, 1, 9, 16),
        _sample("one_column", 2, 9, 1, 16),
        _sample("one_channel", 2, 5, 6, 1),
        _sample("rows_for_many_blocks", 3, 38, 22, 11),
        _sample("to_bfloat16", 2, 6, 6, 48, tags=("odd", "check"), out_dtype=torch.bfloat16),
        _sample("to_float32", 2, 6, 6, 48, out_dtype=torch.float32),
        _sample("gathered_to_bfloat16", 2, 5, 6, 48, norm=None, out_dtype=torch.bfloat16),
        _sample("float32_weights", 2, 6, 6, 48, affine_dtype=torch.float32),
        _sample("channels_first", 2, 5, 6, 24,
                change=lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1)),
        _sample("crossed", 2, 5, 7, 24, change=lambda x: x.transpose(1, 2)),
        _sample("crossed_gathered", 2, 5, 7, 24, norm=None, change=lambda x: x.transpose(1, 2)),
        _sample("cropped", 2, 9, 9, 24, change=lambda x: x[:, 1:8, 2:]),
        _sample("expanded", 1, 5, 6, 24, change=lambda x: x.expand(3, 5, 6, 24)),
        _sample("outlier_channels", 2, 6, 6, 96, change=outlier_channels),
        _sample("far_odd_sizes", 2, 5, 7, 12, change=lambda x: x + 1000),
        _sample("rms_odd_sizes", 1, 3, 5, 12, norm="rms"),
        _sample("empty", 0, 4, 4, 8, tags=("odd", "empty")),
        _sample("no_height", 2, 0, 4, 8, tags=("odd", "empty")),
    ),
)  # fmt: skip
