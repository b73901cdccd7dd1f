"""Samples and cost of `norm_add`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vitfast.ops.norm_add.api import DISPATCHER, norm_add
from vitfast.ops.norm_add.reference import norm_add as reference
from vitfast.ops.residual_add.spec import drop_scale
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
    drop: bool = False,
    has_affine: bool = True,
    norm: str = "layer",
    eps: float = 1e-5,
    x_dtype: torch.dtype | None = None,
    branch_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Sample:
    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        x = randn(g, *shape, dtype=x_dtype or dtype)
        branch = randn(g, *shape, dtype=branch_dtype or dtype)
        if change is not None:
            x, branch = change(x), change(branch)
        channels, weights = x.shape[-1], weight_dtype or dtype
        named: dict[str, Any] = {"norm": norm}
        if drop:
            named["drop_scale"] = drop_scale(x.shape)
        weight = bias = None
        if has_affine:
            weight, bias = affine(g, channels, weights, norm)
        return (x, branch, weight, bias, eps), named

    return Sample(name, make, frozenset(tags))


def _cost(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cost:
    x, branch, weight, bias = args[:4]
    dtype = torch.promote_types(x.dtype, branch.dtype)
    return Cost(
        flops=10.0 * x.numel(),
        bytes=tensor_bytes(x, branch, weight, bias) + x.numel() * dtype.itemsize,
    )


_AUTOCAST: dict[str, Any] = {"x_dtype": torch.float32, "weight_dtype": torch.float32}
"""The stream in float32, the branch as autocast lowers it."""

SPEC = OpSpec(
    name="norm_add",
    public=norm_add,
    reference=reference,
    dispatcher=DISPATCHER,
    cost=_cost,
    samples=(
        _sample("swinv2_tiny_stage1", 1, 64, 64, 96, tags=("real", "check")),
        _sample("swinv2_base_stage3", 1, 16, 16, 512, tags=("real", "check")),
        _sample("swinv2_large_stage4", 2, 12, 12, 1536, tags=("real",)),
        _sample("swinv2_base_stage3_autocast", 4, 16, 16, 512, tags=("real",), **_AUTOCAST),
        _sample("swinv2_large_stage1_1536", 1, 384, 384, 192, tags=("real", "large")),
        _sample("prime_width", 3, 5, 13, tags=("odd", "small", "check"), drop=True),
        _sample("rms_small", 3, 5, 13, tags=("odd", "small"), norm="rms"),
        _sample("no_affine", 2, 7, 24, tags=("odd", "small"), has_affine=False),
        _sample("rms", 2, 64, 384, tags=("odd", "check"), norm="rms", drop=True),
        _sample("drop_path", 4, 3, 6, 64, drop=True),
        _sample("autocast_training", 3, 17, 64, drop=True, **_AUTOCAST),
        _sample("float32_stream", 2, 17, 64, x_dtype=torch.float32),
        _sample("float32_branch", 2, 17, 64, branch_dtype=torch.float32, drop=True),
        _sample("float32_weights", 2, 17, 64, weight_dtype=torch.float32),
        _sample("one_channel", 7, 1, tags=("odd", "zero:branch", "zero:weight")),
        _sample("width_1023", 2, 9, 1023, drop=True),
        _sample("one_token", 1, 1, 768),
        _sample("rows_only", 9, 33, drop=True),
        _sample("transposed", 2, 24, 24, change=lambda x: x.transpose(0, 1)),
        _sample("crossed_tokens", 2, 5, 7, 48, drop=True, change=lambda x: x.transpose(1, 2)),
        _sample("strided_rows", 4, 6, 40, change=lambda x: x[:, ::2]),
        _sample("strided_last", 3, 6, 34, change=lambda x: x.mT.contiguous().mT),
        _sample("expanded", 1, 50, change=lambda x: x.expand(6, 50)),
        _sample("outlier_channels", 33, 384, change=outlier_channels),
        _sample("empty", 0, 16, tags=("odd", "empty")),
    ),
)
