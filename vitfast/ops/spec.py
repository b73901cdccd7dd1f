"""OpSpec: one op's description, read by tests, benchmarks, `vitfast info`, `check` and the docs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vitfast.runtime.dispatch import Dispatcher

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a public function."""


@dataclass(frozen=True)
class Cost:
    """Work of one forward call, counted before any kernel is written."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Sample:
    """One set of inputs.

    Args:
        name: unique within the op, e.g. "vit_base_224".
        make: (dtype, generator) -> (args, kwargs) on the CPU; values as in real models.
        tags: "real" (a model's shape, used by benchmarks too), "odd" (tests only),
            "small" (cheap enough for float64 gradcheck), "check" (part of `vitfast check`),
            "tiles" (sizes about the compiled kernels' internal tiles).
    """

    name: str
    make: Callable[[torch.dtype, torch.Generator], Arguments]
    tags: frozenset[str] = frozenset()


@dataclass(frozen=True)
class OpSpec:
    """Everything generic code has to know of an op.

    Args:
        public: the function users call; accepts `backend=`.
        reference: same arguments in plain PyTorch, any floating dtype: the definition.
        dispatcher: its backends in order.
        cost: (args, kwargs) -> Cost.
        dtypes: dtypes whose numerics tests cover on the CPU.
        forward_factor, backward_factor, rms_factor: how much larger than the error of the
            reference run in the working dtype an error may be (see vitfast.testing.errors).
    """

    name: str
    public: Callable[..., Any]
    reference: Callable[..., Any]
    dispatcher: Dispatcher
    samples: Sequence[Sample]
    cost: Callable[[tuple[Any, ...], dict[str, Any]], Cost]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    forward_factor: float = 2.0
    backward_factor: float = 3.0
    rms_factor: float = 1.25
    notes: str = field(default="")


def tensor_bytes(*tensors: torch.Tensor | None) -> float:
    """Bytes of all elements; None counts nothing."""
    return float(sum(t.numel() * t.element_size() for t in tensors if t is not None))


def randn(
    generator: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0
) -> torch.Tensor:
    """Zero-mean values drawn in float64 and rounded, so that every dtype sees the same numbers."""
    return (torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu") * scale).to(
        dtype
    )


def affine(
    generator: torch.Generator, channels: int, dtype: torch.dtype, norm: str = "layer"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a norm, [channels] each, about 1 and 0; "rms" has no bias."""
    weight = 1 + randn(generator, channels, dtype=dtype, scale=0.1)
    if norm == "rms":
        return weight, None
    return weight, randn(generator, channels, dtype=dtype, scale=0.1)


def outlier_channels(x: torch.Tensor) -> torch.Tensor:
    """x with its first two channels 50 times as large: the residual streams of trained models."""
    x[..., :2] *= 50
    return x
