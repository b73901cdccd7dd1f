"""Norm, then residual connection, in plain PyTorch: the definition."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vitfast.ops.add_norm.reference import normalise
from vitfast.ops.residual_add.reference import residual_add


class Call(NamedTuple):
    """The arguments of `vitfast::norm_add` before `backend`, in the order of its schema.

    dtype is the sum's, save_stats says whether the statistics that the backward needs, [rows, 2] of
    the branch's mean (0 with "rms") and 1 / sqrt(var + eps), are returned beside the sum. The
    others as in `vitfast.ops.norm_add`; in the backward, which does without x, the gradient of the
    sum stands in its place.
    """

    x: torch.Tensor
    branch: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    drop_scale: torch.Tensor | None
    norm: str
    dtype: torch.dtype
    save_stats: bool


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
