"""Global response norm, in plain PyTorch: the definition."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Call(NamedTuple):
    """The arguments of `vitfast::grn` before `backend`, in the order of its schema.

    Args:
        x, weight, bias, eps: as in `grn`.
        out_dtype: dtype of the result; None for what torch makes of x, weight and bias.
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float
    out_dtype: torch.dtype | None

    @property
    def result_dtype(self) -> torch.dtype:
        """The dtype of the result."""
        return self.out_dtype or promoted(self.x, self.weight, self.bias)


def grn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """timm `GlobalResponseNorm`: x + (bias + weight * x * n), n = |x| / (mean of |x| + eps)."""
    given = promoted(x, weight, bias)
    # float32 or better: the statistics of a map of half precision would be worth little in it.
    dtype = torch.promote_types(given, torch.float32)
    wide, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    g = torch.linalg.vector_norm(wide, dim=tuple(range(1, x.ndim - 1)), keepdim=True)
    n = g / (g.mean(-1, keepdim=True) + eps)
    return (wide + torch.addcmul(bias, weight, wide * n)).to(out_dtype or given)


def promoted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.dtype:
    """The dtype that torch gives x + (bias + weight * x)."""
    return torch.promote_types(torch.promote_types(x.dtype, weight.dtype), bias.dtype)
