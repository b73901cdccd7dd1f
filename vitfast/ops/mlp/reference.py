"""The MLP of a transformer block in plain PyTorch: the definition."""

from __future__ import annotations

import torch

from vitfast.ops.grn.reference import grn as response
from vitfast.ops.linear_act.reference import linear_act


def mlp(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None = None,
    act: str = "gelu",
    *,
    gate: str | None = None,
    grn: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """fc2(act(fc1(x))), or with one half of fc1 as the gate of the other, or a norm before fc2."""
    hidden = linear_act(x, weight1, bias1, act, gate=gate)
    if grn is not None:
        hidden = response(hidden, *grn, out_dtype=hidden.dtype)
    return linear_act(hidden, weight2, bias2)
