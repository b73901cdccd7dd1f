"""RMSNorm over the last dimension, in plain PyTorch: the definition."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Call(NamedTuple):
    """The arguments of `vitfast::rms_norm` before `backend`, in the order of its schema.

    As in `vitfast.ops.rms_norm`; save_stats says whether the statistics that the backward needs,
    [rows, 2] of 0 and 1 / sqrt(mean(x^2) + eps), are returned beside the result.
    """

    x: torch.Tensor
    weight: torch.Tensor | None
    eps: float
    out_dtype: torch.dtype | None
    save_stats: bool


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight."""
    # One dtype for all, float32 or better: sums over rows in the backward are as good as the
    # statistics, whatever the dtypes are.
    dtype = torch.promote_types(x.dtype, torch.float32)
    dtype = dtype if weight is None else torch.promote_types(dtype, weight.dtype)
    y = F.rms_norm(x.to(dtype), x.shape[-1:], None if weight is None else weight.to(dtype), eps)
    return y.to(out_dtype or x.dtype)
