"""Samples and cost of `grn`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vitfast.ops.grn.api import DISPATCHER, grn
from vitfast.ops.grn.reference import grn as reference
from vitfast.ops.grn.reference import promoted
from vitfast.ops.spec import Cost, OpSpec, Sample, randn, tensor_bytes


def _sample(
    name: str,
    *shape: int,
    tags: Sequence[str] = ("odd",),
    affine_dtype: torch.dtype | None = None,
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
    eps: float = 1e-6,
    **kwargs: Any,
) -> Sample:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = randn(g, *shape, dtype=dtype)
        if change is not None:
            x = change(x)
        weight, bias = (randn(g, x.shape[-1], dtype=affine_dtype or dtype) for _ in range(2))
        return (x, weight, bias, eps), kwargs

    return Sample(name, make, frozenset(tags))


def _planar(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(-1, 1).contiguous().movedim(1, -1)


def _outlier_channels(x: torch.Tensor) -> torch.Tensor:
    x[..., ::12] *= 50
    return x


def _dead_channels(x: torch.Tensor) -> torch.Tensor:
    x[..., ::3] = 0
    return x


def _of_hidden_units(x: torch.Tensor) -> torch.Tensor:
    """As GELU leaves them: mostly near zero, some large."""
    return torch.nn.functional.gelu(2 * x.float()).to(x.dtype)


def _cost(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cost:
    x, weight, bias = args[:3]
    y = x.numel() * (kwargs.get("out_dtype") or promoted(x, weight, bias)).itemsize
    return Cost(flops=6.0 * x.numel(), bytes=2 * tensor_bytes(x) + tensor_bytes(weight, bias) + y)


SPEC = OpSpec(
    name="grn",
    public=grn,
    reference=reference,
    dispatcher=DISPATCHER,
    cost=_cost,
    samples=(
        _sample("convnextv2_tiny_stage1", 1, 56, 56, 384, tags=("real",), change=_of_hidden_units),
        _sample("convnextv2_tiny_stage3", 1, 14, 14, 1536, tags=("real", "check"),
                change=_of_hidden_units),
        _sample("convnextv2_tiny_stage2_b8", 8, 28, 28, 768, tags=("real",),
                change=_of_hidden_units),
        _sample("convnextv2_atto_stage1_planar", 1, 56, 56, 160, tags=("real", "check"),
                change=lambda x: _planar(_of_hidden_units(x))),
        _sample("convnextv2_tiny_stage1_4k", 1, 540, 960, 384, tags=("real", "large")),
        _sample("tokens", 2, 11, 13, tags=("odd", "small", "check")),
        _sample("map", 2, 3, 5, 7, tags=("odd", "small", "check")),
        _sample("planar", 2, 5, 4, 6, tags=("odd", "small", "check"), change=_planar),
        _sample("many_positions", 1, 77, 31, 24, tags=("odd",)),
        _sample("many_positions_planar", 2, 71, 37, 20, change=_planar),
        _sample("many_images", 7, 9, 9, 40),
        _sample("many_images_planar", 5, 9, 9, 40, change=_planar),
        _sample("tokens_planar", 3, 50, 33, change=_planar),
        _sample("one_position", 3, 1, 1, 16),
        _sample("one_channel", 1, 2, 3, 1),
        _sample("width_1023", 2, 3, 6, 1023),
        _sample("width_10000", 1, 2, 3, 10000),
        _sample("to_bfloat16", 2, 6, 6, 48, tags=("odd", "check"), out_dtype=torch.bfloat16),
        _sample("to_float32", 2, 6, 6, 48, out_dtype=torch.float32),
        _sample("to_bfloat16_planar", 2, 6, 6, 48, change=_planar, out_dtype=torch.bfloat16),
        _sample("float32_weights", 2, 6, 6, 48, affine_dtype=torch.float32),
        _sample("crossed", 2, 5, 7, 24, change=lambda x: x.transpose(1, 2)),
        _sample("cropped", 2, 9, 9, 24, change=lambda x: x[:, 1:8, 2:]),
        _sample("every_second_row", 2, 18, 24, change=lambda x: x[:, ::2]),
        _sample("expanded", 1, 5, 6, 24, change=lambda x: x.expand(3, 5, 6, 24)),
        _sample("outlier_channels", 2, 6, 6, 96, change=_outlier_channels),
        _sample("dead_channels", 2, 6, 6, 24, change=_dead_channels),
        _sample("faint", 2, 6, 6, 24, change=lambda x: x * 1e-3, eps=1e-3),
        _sample("empty", 0, 4, 4, 8, tags=("odd", "empty")),
        _sample("no_height", 2, 0, 4, 8, tags=("odd", "empty")),
    ),
)  # fmt: skip
