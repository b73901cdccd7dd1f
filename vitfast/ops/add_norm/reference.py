"""Residual connection, then norm, in plain PyTorch: the definition."""

from __future__ import annotations

import torch

from vitfast.ops.layer_norm.reference import layer_norm
from vitfast.ops.residual_add.reference import residual_add
from vitfast.ops.rms_norm.reference import rms_norm


def add_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    gamma: torch.Tensor | None = None,
    drop_scale: torch.Tensor | None = None,
    norm: str = "layer",
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual = x + drop_scale * gamma * branch; normed = norm(residual). Gives both."""
    residual = residual_add(x, branch, gamma=gamma, drop_scale=drop_scale)
    return residual, normalise(residual, weight, bias, eps, norm, out_dtype)


def normalise(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    norm: str,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    if norm == "rms":
        return rms_norm(x, weight, eps, out_dtype=out_dtype)
    return layer_norm(x, weight, bias, eps, out_dtype=out_dtype)
