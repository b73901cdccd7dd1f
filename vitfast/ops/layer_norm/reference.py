"""LayerNorm over the last dimension, in plain PyTorch: the definition."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Call(NamedTuple):
    """The arguments of `vitfast::layer_norm` before `backend`, in the order of its schema.

    As in `vitfast.ops.layer_norm`; save_stats says whether the statistics that the backward needs,
    [rows, 2] of mean and 1 / sqrt(var + eps), are returned beside the result.
    """

    x: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    out_dtype: torch.dtype | None
    save_stats: bool


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias; the variance is the biased one."""
    # One dtype for all, float32 or better: sums over rows in the backward are as good as the
    # statistics, whatever the dtypes are.
    dtype = torch.float32
    for t in (x, weight, bias):
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    y = F.layer_norm(
        x.to(dtype),
        x.shape[-1:],
        None if weight is None else weight.to(dtype),
        None if bias is None else bias.to(dtype),
        eps,
    )
    return y.to(out_dtype or x.dtype)
