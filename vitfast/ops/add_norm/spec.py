"""Samples and cost of `add_norm`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vitfast.ops.add_norm.api import DISPATCHER, add_norm
from vitfast.ops.add_norm.reference import add_norm as reference
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
    gamma: float | None = None,
    drop: bool = False,
    has_affine: bool = True,
    norm: str = "layer",
    eps: float = 1e-6,
    x_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **kwargs: Any,
) -> Sample:
    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        x = randn(g, *shape, dtype=x_dtype or dtype)
        branch = randn(g, *shape, dtype=dtype)
        if change is not None:
            x, branch = change(x), change(branch)
        channels, weights = x.shape[-1], weight_dtype or dtype
        named = dict(kwargs, norm=norm)
        if gamma is not None:
            named["gamma"] = gamma * (1 + randn(g, channels, dtype=weights, scale=0.1))
        if drop:
            named["drop_scale"] = drop_scale(x.shape)
        weight = bias = None
        if has_affine:
            weight, bias = affine(g, channels, weights, norm)
        return (x, branch, weight, bias, eps), named

    return Sample(name, make, frozenset(tags))


def _cost(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cost:
    x, branch, weight, bias = args[:4]
    gamma = kwargs.get("gamma")
    residual = torch.promote_types(x.dtype, branch.dtype)
    if gamma is not None:
        residual = torch.promote_types(residual, gamma.dtype)
    normed = kwargs.get("out_dtype") or residual
    return Cost(
        flops=11.0 * x.numel(),
        bytes=tensor_bytes(x, branch, gamma, weight, bias)
        + x.numel() * (residual.itemsize + normed.itemsize),
    )


_AUTOCAST: dict[str, Any] = {
    "x_dtype": torch.float32, "weight_dtype": torch.float32, "out_dtype": torch.bfloat16
}  # fmt: skip

SPEC = OpSpec(
    name="add_norm",
    public=add_norm,
    reference=reference,
    dispatcher=DISPATCHER,
    cost=_cost,
    samples=(
        _sample("vit_base_224", 1, 197, 768, tags=("real", "check")),
        _sample("vit_base_1024", 1, 4097, 768, tags=("real",)),
        _sample("dinov2_small_518", 1, 1370, 384, tags=("real", "check"), gamma=1.0),
        _sample("so400m_384", 1, 729, 1152, tags=("real",)),
        _sample("vit_base_224_b8_autocast", 8, 197, 768, tags=("real",), **_AUTOCAST),
        _sample("vit_large_4k", 1, 32400, 1024, tags=("real", "large")),
        _sample("rms", 2, 64, 384, tags=("odd", "check"), norm="rms", eps=1e-5),
        _sample("prime_width", 3, 5, 13, tags=("odd", "small", "check"), gamma=0.1, drop=True),
        _sample("rms_small", 3, 5, 13, tags=("odd", "small"), gamma=0.1, norm="rms"),
        _sample("no_affine", 2, 7, 24, tags=("odd", "small"), has_affine=False),
        _sample("drop_path", 4, 17, 64, drop=True),
        _sample("gamma_1e-5", 2, 17, 64, gamma=1e-5),
        _sample("autocast_training", 3, 17, 64, gamma=0.5, drop=True, **_AUTOCAST),
        _sample("float32_stream", 2, 17, 64, x_dtype=torch.float32),
        _sample("float32_gamma", 2, 17, 64, gamma=0.5, weight_dtype=torch.float32),
        _sample("width_1023", 2, 9, 1023, gamma=1.0),
        _sample("one_token", 1, 1, 768),
        _sample("rows_only", 9, 33, gamma=1.0, drop=True),
        _sample("transposed", 2, 24, 24, change=lambda x: x.transpose(0, 1)),
        _sample("strided_rows", 4, 6, 40, change=lambda x: x[:, ::2]),
        _sample("strided_last", 3, 6, 34, gamma=1.0, change=lambda x: x.mT.contiguous().mT),
        _sample("expanded", 1, 50, change=lambda x: x.expand(6, 50)),
        _sample("outlier_channels", 33, 384, change=outlier_channels),
        _sample("empty", 0, 16, tags=("odd", "empty")),
    ),
)
