"""Samples and cost of `mlp`."""

from __future__ import annotations

from typing import Any

import torch

from vitfast.ops.mlp.api import DISPATCHER, mlp
from vitfast.ops.mlp.reference import mlp as reference
from vitfast.ops.spec import Cost, OpSpec, Sample, randn, tensor_bytes


def _sample(
    name: str,
    lead: tuple[int, ...],
    k: int,
    n: int,
    act: str = "gelu",
    *,
    out: int | None = None,
    gate: str | None = None,
    bias: bool = True,
    grn: bool = False,
    tags: tuple[str, ...] = ("odd",),
) -> Sample:
    """x [*lead, k], fc1 [n, k] (n counts both halves of a gate), fc2 [out or k, hidden]."""

    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = n // 2 if gate else n

        def layer(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor | None]:
            vector = randn(g, rows, dtype=dtype, scale=0.3) if bias else None
            return randn(g, rows, columns, dtype=dtype, scale=1.2 * columns**-0.5), vector

        x = randn(g, *lead, k, dtype=dtype)
        kwargs: dict[str, Any] = {} if gate is None else {"gate": gate}
        if grn:
            weight, vector = (randn(g, hidden, dtype=dtype, scale=0.5) for _ in range(2))
            kwargs["grn"] = (weight, vector, 1e-6)
        return (x, *layer(n, k), *layer(out or k, hidden), act), kwargs

    return Sample(name, make, frozenset(tags))


def _cost(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cost:
    x, weight1, bias1, weight2, bias2 = args[:5]
    rows = x.numel() // max(x.shape[-1], 1)
    read = tensor_bytes(x, weight1, bias1, weight2, bias2)
    out = rows * weight2.shape[0] * x.element_size()
    return Cost(flops=2.0 * rows * (weight1.numel() + weight2.numel()), bytes=read + out)


_SMALL = ("odd", "small")

SPEC = OpSpec(
    name="mlp",
    public=mlp,
    reference=reference,
    dispatcher=DISPATCHER,
    cost=_cost,
    samples=(
        _sample("vit_base_224", (1, 197), 768, 3072, tags=("real", "check")),
        _sample("vit_base_1024", (1, 4097), 768, 3072, tags=("real", "large")),
        _sample("clip_base_32", (1, 50), 768, 3072, "quick_gelu", tags=("real",)),
        _sample("prime_sizes", (5, 3), 13, 7, tags=("odd", "small", "check")),
        _sample("other_width", (4, 3), 12, 20, "silu", out=5, tags=_SMALL),
        _sample("gate_first", (2, 7), 12, 10, "silu", gate="first", tags=_SMALL),
        _sample("gate_last", (2, 7), 12, 26, "sigmoid", gate="last", bias=False, tags=_SMALL),
        _sample("no_activation", (9,), 8, 6, "none", tags=_SMALL),
        _sample("grn", (2, 5, 6), 12, 20, grn=True, tags=_SMALL),
        _sample("grn_of_tokens", (3, 65), 40, 130, "silu", grn=True),
        _sample("relu", (3, 37), 40, 65, "relu"),
        _sample("gelu_tanh", (70,), 33, 129, "gelu_tanh"),
        _sample("empty", (0, 4), 16, 8, tags=("odd", "empty")),
    ),
)
