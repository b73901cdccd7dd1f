"""Samples and cost of `layer_norm`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vitfast.ops.layer_norm.api import DISPATCHER, layer_norm
from vitfast.ops.layer_norm.reference import layer_norm as reference
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
        weight = bias = None
        if has_affine:
            weight, bias = affine(g, x.shape[-1], affine_dtype or dtype)
        return (x, weight, bias, eps), kwargs

    return Sample(name, make, frozenset(tags))


def _constant_rows(x: torch.Tensor) -> torch.Tensor:
    x[1::2] = x[1::2, :1]
    return x


def _cost(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cost:
    x, weight, bias = args[:3]
    y = x.numel() * (kwargs.get("out_dtype") or x.dtype).itemsize
    return Cost(flops=8.0 * x.numel(), bytes=tensor_bytes(x, weight, bias) + y)


SPEC = OpSpec(
    name="layer_norm",
    public=layer_norm,
    reference=reference,
    dispatcher=DISPATCHER,
    cost=_cost,
    samples=(
        _sample("vit_base_224", 1, 197, 768, tags=("real", "check")),
        _sample("vit_base_224_b8", 8, 197, 768, tags=("real",)),
        _sample("vit_base_1024", 1, 4097, 768, tags=("real",)),
        _sample("dinov2_small_518", 1, 1370, 384, tags=("real",)),
        _sample("so400m_384", 1, 729, 1152, tags=("real",)),
        _sample("clip_eps", 2, 50, 768, tags=("real", "odd"), eps=1e-5),
        _sample("vit_large_4k", 1, 32400, 1024, tags=("real", "large")),
        _sample("to_bfloat16", 2, 50, 192, tags=("odd", "check"), out_dtype=torch.bfloat16),
        _sample("to_float32", 2, 50, 192, out_dtype=torch.float32),
        _sample("float32_weights", 2, 50, 192, affine_dtype=torch.float32),
        _sample("prime_width", 3, 5, 13, tags=("odd", "small", "check")),
        _sample("one_channel", 7, 1, tags=("odd", "zero:x", "zero:weight")),
        _sample("width_1023", 2, 9, 1023, eps=1e-5),
        _sample("width_10000", 3, 10000),
        _sample("one_token", 1, 1, 768),
        _sample("vector", 40),
        _sample("no_affine", 4, 37, has_affine=False, tags=("odd", "small")),
        _sample("transposed", 2, 24, 24, change=lambda x: x.transpose(0, 1)),
        _sample("feature_map", 2, 5, 7, 48, change=lambda x: x.movedim(-1, 1).movedim(1, -1)),
        _sample("crossed_tokens", 2, 5, 7, 48, change=lambda x: x.transpose(1, 2)),
        _sample("strided_rows", 4, 6, 40, change=lambda x: x[:, ::2]),
        _sample("strided_last", 6, 34, change=lambda x: x.mT.contiguous().mT),
        _sample("expanded", 1, 50, change=lambda x: x.expand(6, 50)),
        _sample("outlier_channels", 33, 384, change=outlier_channels),
        _sample("constant_rows", 6, 48, change=_constant_rows),
        _sample("offset_rows", 16, 768, change=lambda x: x + 30),
        # One row more or less than 2 and 16, which the kernels take side by side.
        *(_sample(f"rows_{n}", n, 100, tags=("odd", "tiles")) for n in (3, 15, 16, 17, 33)),
        _sample("far_rows", 5, 300, change=lambda x: x + 200),
        _sample("empty", 0, 16, tags=("odd", "empty")),
        _sample("no_tokens", 2, 0, 16, tags=("odd", "empty")),
    ),
)
