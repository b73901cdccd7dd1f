"""Samples and cost of `linear_act`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vitfast.ops.linear_act.api import DISPATCHER, linear_act
from vitfast.ops.linear_act.reference import linear_act as reference
from vitfast.ops.linear_act.reference import output_width
from vitfast.ops.spec import Cost, OpSpec, Sample, randn, tensor_bytes


def _sample(
    name: str,
    lead: tuple[int, ...],
    k: int,
    n: int,
    act: str = "none",
    *,
    gate: str | None = None,
    two: bool = False,
    bias: bool = True,
    conv: bool = False,
    view: Callable[[torch.Tensor], torch.Tensor] | None = None,
    weight_view: Callable[[torch.Tensor], torch.Tensor] | None = None,
    outliers: bool = False,
    tags: tuple[str, ...] = ("odd",),
) -> Sample:
    """x [*lead, k] and a weight [n, k]: n counts both halves of a packed gate."""

    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def weight() -> torch.Tensor:
            w = randn(g, n, k, dtype=dtype, scale=1.2 * k**-0.5)
            w = w if weight_view is None else weight_view(w)
            return w[..., None, None] if conv else w

        def vector() -> torch.Tensor | None:
            return randn(g, n, dtype=dtype, scale=0.3) if bias else None

        x = randn(g, *lead, k, dtype=dtype)
        if outliers:
            x[..., :2] *= 50
        kwargs: dict[str, Any] = {} if gate is None else {"gate": gate}
        if two:
            kwargs |= {"gate_weight": weight(), "gate_bias": vector()}
        return (x if view is None else view(x), weight(), vector(), act), kwargs

    return Sample(name, make, frozenset(tags))


def _cost(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cost:
    x, weight, bias = args[:3]
    gate_weight, gate_bias = kwargs.get("gate_weight"), kwargs.get("gate_bias")
    rows = x.numel() // max(x.shape[-1], 1)
    weights = weight.numel() + (0 if gate_weight is None else gate_weight.numel())
    out = rows * output_width(weight, kwargs.get("gate") or "") * x.element_size()
    read = tensor_bytes(x, weight, bias, gate_weight, gate_bias)
    return Cost(flops=2.0 * rows * weights, bytes=read + out)


_REAL, _LARGE, _SMALL = ("real",), ("real", "large"), ("odd", "small")

SPEC = OpSpec(
    name="linear_act",
    public=linear_act,
    reference=reference,
    dispatcher=DISPATCHER,
    cost=_cost,
    samples=(
        _sample("vit_base_224_fc1", (1, 197), 768, 3072, "gelu", tags=("real", "check")),
        _sample("vit_base_224_fc2", (1, 197), 3072, 768, tags=("real", "check")),
        _sample("vit_base_224_qkv", (1, 197), 768, 2304, tags=_REAL),
        _sample("vit_base_224_proj", (1, 197), 768, 768, tags=_REAL),
        _sample("vit_base_224_fc1_batch_8", (8, 197), 768, 3072, "gelu", tags=_REAL),
        _sample("vit_base_1024_fc1", (1, 4097), 768, 3072, "gelu", tags=_LARGE),
        _sample("vit_base_1024_fc2", (1, 4097), 3072, 768, tags=_LARGE),
        _sample("vit_base_1024_qkv", (1, 4097), 768, 2304, tags=_LARGE),
        _sample("dinov2_small_518_fc1", (1, 1370), 384, 1536, "gelu", tags=_REAL),
        _sample("dinov2_giant_swiglu", (1, 33), 1536, 8192, "silu", gate="first", tags=_REAL),
        _sample("dinov3_small_256_fc1", (1, 261), 384, 1536, "gelu", tags=_REAL),
        _sample("eva02_large_swiglu", (1, 50), 1024, 2730, "silu", two=True, tags=_REAL),
        _sample("so400m_384_fc1", (1, 729), 1152, 4304, "gelu_tanh", tags=_LARGE),
        _sample("so400m_384_fc2", (1, 729), 4304, 1152, tags=_LARGE),
        _sample("clip_base_32_fc1", (1, 50), 768, 3072, "quick_gelu", tags=_REAL),
        _sample("long_sums", (3, 7), 4304, 40, tags=("odd", "check")),
        _sample("prime_sizes", (5, 3), 13, 7, "gelu", tags=("odd", "small", "check")),
        _sample("gelu_tanh", (9,), 17, 19, "gelu_tanh", tags=_SMALL),
        _sample("quick_gelu", (4, 2), 6, 11, "quick_gelu", tags=_SMALL),
        _sample("relu", (2, 3, 4), 8, 5, "relu", tags=_SMALL),
        _sample("sigmoid_without_bias", (6,), 9, 33, "sigmoid", bias=False, tags=_SMALL),
        _sample("gate_last", (2, 7), 12, 26, "sigmoid", gate="last", tags=_SMALL),
        _sample("gate_first", (2, 7), 12, 10, "gelu", gate="first", tags=("odd", "small", "check")),
        _sample("gate_bilinear", (5,), 8, 12, gate="last", bias=False, tags=_SMALL),
        _sample("two_weights", (3, 5), 11, 21, "silu", two=True, tags=("odd", "small", "check")),
        _sample("two_weights_bare", (8,), 5, 6, "gelu_tanh", two=True, bias=False, tags=_SMALL),
        _sample("one_input_channel", (4, 9), 1, 24, "gelu"),
        _sample("one_output_channel", (40, 9), 24, 1, "silu"),
        _sample("one_row", (), 37, 40, "gelu"),
        _sample("one_by_one_convolution", (2, 5), 16, 24, "gelu", conv=True, tags=_SMALL),
        _sample("without_class_token", (2, 14), 40, 24, "gelu", view=lambda x: x[:, 1:]),
        _sample("class_tokens", (70, 5), 40, 24, view=lambda x: x[:, 0]),
        _sample("transposed_rows", (6, 10), 20, 30, "silu", view=lambda x: x.transpose(0, 1)),
        _sample("strided_channels", (21,), 34, 18, view=lambda x: x.mT.contiguous().mT),
        _sample("expanded", (1,), 30, 12, "gelu", view=lambda x: x.expand(7, 30)),
        _sample("transposed_weight", (11,), 25, 35, weight_view=lambda w: w.mT.contiguous().mT),
        _sample("outlier_channels", (33,), 384, 100, "gelu", outliers=True),
        _sample("wide_rows", (260,), 129, 65, "gelu"),
        _sample("empty", (0, 4), 16, 8, "gelu", tags=("odd", "empty")),
    ),
)
