"""Norm, then residual connection, in plain PyTorch: the definition."""

from __future__ import annotations

import torch

from vitfast.ops.add_norm.reference import normalise
from vitfast.ops.residual_add.reference import residual_add


def norm_add(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    drop_scale: torch.Tensor | None = None,
    norm: str = "layer",
) -> torch.Tensor:
    """x + drop_scale * norm(branch), the norm in the dtype of the sum."""
    dtype = torch.promote_types(x.dtype, branch.dtype)
    normed = normalise(branch, weight, bias, eps, norm, dtype)
    return residual_add(x, normed, drop_scale=drop_scale)
