"""Samples and cost of `rms_norm`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vitfast.ops.rms_norm.api import DISPATCHER, rms_norm
from vitfast.ops.rms_norm.reference import rms_norm as reference
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
    eps: float = 1e-6,
    has_affine: bool = True,
    affine_dtype: torch.dtype | None = None,
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **kwargs: Any,
) -> Sample:
    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        x = randn(g, *shape, dtype=dtype)
        if change is not None:
            x = change(x)
        weight = None
        if has_affine:
            weight, _ = affine(g, x.shape[-1], affine_dtype or dtype, "rms")
        return (x, weight, eps), kwargs

    return Sample(name, make, frozenset(tags))


def _zero_rows(x: torch.Tensor) -> torch.Tensor:
    x[1::2] = 0
    return x


def _cost(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cost:
    x, weight = args[:2]
    y = x.numel() * (kwargs.get("out_dtype") or x.dtype).itemsize
    return Cost(flops=4.0 * x.numel(), bytes=tensor_bytes(x, weight) + y)


SPEC = OpSpec(
    name="rms_norm",
    public=rms_norm,
    reference=reference,
    dispatcher=DISPATCHER,
    cost=_cost,
    samples=(
        _sample("aimv2_large_224", 1, 256, 1024, tags=("real", "check"), eps=1e-5),
        _sample("naflex_base_1024", 1, 4096, 768, tags=("real",)),
        _sample("vit_large_4k", 1, 32400, 1024, tags=("real", "large")),
        _sample("to_bfloat16", 2, 50, 192, tags=("odd", "check"), out_dtype=torch.bfloat16),
        _sample("to_float32", 2, 50, 192, out_dtype=torch.float32),
        _sample("float32_weights", 2, 50, 192, affine_dtype=torch.float32),
        _sample("prime_width", 3, 5, 13, tags=("odd", "small", "check")),
        _sample("width_1", 7, 1, eps=0.1),
        _sample("width_1023", 2, 9, 1023),
        _sample("one_token", 1, 1, 768),
        _sample("no_affine", 4, 37, has_affine=False, tags=("odd", "small")),
        _sample("transposed", 2, 24, 24, change=lambda x: x.transpose(0, 1)),
        _sample("strided_rows", 4, 6, 40, change=lambda x: x[:, ::2]),
        _sample("strided_last", 6, 34, change=lambda x: x.mT.contiguous().mT),
        _sample("expanded", 1, 50, change=lambda x: x.expand(6, 50)),
        _sample("outlier_channels", 33, 384, change=outlier_channels),
        _sample("zero_rows", 6, 48, change=_zero_rows),
        _sample("empty", 0, 16, tags=("odd", "empty")),
    ),
)
