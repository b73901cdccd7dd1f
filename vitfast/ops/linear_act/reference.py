"""Linear layer with its activation, plain or gated, in plain PyTorch: the definition."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


def linear_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    act: str = "none",
    *,
    gate: str | None = None,
    gate_weight: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(x W^T + b); gated, the product of one linear layer and the activation of another.

    Weights and biases are rounded to x's dtype, as autocast does.
    """
    z = _linear(x, weight, bias)
    if gate_weight is not None:
        return activate(_linear(x, gate_weight, gate_bias), z, act, "first")
    if gate is None:
        return ACTIVATIONS[act](z)
    return activate(*z.chunk(2, dim=-1), act, gate)


def activate(first: torch.Tensor, second: torch.Tensor, act: str, gate: str) -> torch.Tensor:
    """The product of two halves, one of them through the activation."""
    if gate == "first":
        return ACTIVATIONS[act](first) * second
    return first * ACTIVATIONS[act](second)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    weight = weight.flatten(1).to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
