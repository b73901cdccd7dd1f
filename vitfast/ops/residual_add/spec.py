"""Samples and cost of `residual_add`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vitfast.ops.residual_add.api import DISPATCHER, residual_add
from vitfast.ops.residual_add.reference import residual_add as reference
from vitfast.ops.spec import Arguments, Cost, OpSpec, Sample, randn, tensor_bytes


def drop_scale(shape: torch.Size, keep: float = 0.75) -> torch.Tensor:
    """DropPath's factors [B] with the first sample dropped and the others kept."""
    scale = torch.full(shape[:1], 1 / keep, device="cpu")
    scale[0] = 0
    return scale


def _sample(
    name: str,
    *shape: int,
    tags: tuple[str, ...] = ("odd",),
    gamma: float | None = None,
    drop: bool = False,
    x_dtype: torch.dtype | None = None,
    gamma_dtype: torch.dtype | None = None,
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Sample:
    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        x = randn(g, *shape, dtype=x_dtype or dtype)
        branch = randn(g, *shape, dtype=dtype)
        if change is not None:
            x, branch = change(x), change(branch)
        kwargs = {}
        if gamma is not None:
            kwargs["gamma"] = gamma * (
                1 + randn(g, x.shape[-1], dtype=gamma_dtype or dtype, scale=0.1)
            )
        if drop:
            kwargs["drop_scale"] = drop_scale(x.shape)
        return (x, branch), kwargs

    return Sample(name, make, frozenset(tags))


def _cost(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cost:
    x, branch = args
    gamma = kwargs.get("gamma")
    dtype = torch.promote_types(x.dtype, branch.dtype)
    if gamma is not None:
        dtype = torch.promote_types(dtype, gamma.dtype)
    return Cost(
        flops=(3.0 if kwargs else 1.0) * x.numel(),
        bytes=tensor_bytes(x, branch, gamma) + x.numel() * dtype.itemsize,
    )


SPEC = OpSpec(
    name="residual_add",
    public=residual_add,
    reference=reference,
    dispatcher=DISPATCHER,
    cost=_cost,
    samples=(
        _sample("dinov2_small_518", 1, 1370, 384, tags=("real", "check"), gamma=1.0),
        _sample("vit_base_224", 1, 197, 768, tags=("real",)),
        _sample("vit_base_1024", 1, 4097, 768, tags=("real",)),
        _sample("vit_large_4k", 1, 32400, 1024, tags=("real", "large")),
        _sample("prime_width", 3, 5, 13, tags=("odd", "small", "check"), gamma=0.1, drop=True),
        _sample("gamma_1e-5", 2, 17, 64, gamma=1e-5),
        _sample("drop_path", 4, 17, 64, drop=True),
        _sample("float32_stream", 2, 17, 64, x_dtype=torch.float32),
        _sample("float32_gamma", 2, 17, 64, gamma=0.5, gamma_dtype=torch.float32),
        _sample("autocast_training", 3, 17, 64, gamma=0.5, drop=True, x_dtype=torch.float32,
                gamma_dtype=torch.float32),
        _sample("one_channel", 7, 1, gamma=1.0),
        _sample("rows_only", 9, 33, gamma=1.0, drop=True),
        _sample("transposed", 2, 24, 24, gamma=1.0, change=lambda x: x.transpose(0, 1)),
        _sample("strided_last", 3, 6, 34, gamma=1.0, change=lambda x: x.mT.contiguous().mT),
        _sample("expanded", 1, 50, gamma=1.0, change=lambda x: x.expand(6, 50)),
        _sample("empty", 0, 16, tags=("odd", "empty"), gamma=1.0),
    ),
)  # fmt: skip
