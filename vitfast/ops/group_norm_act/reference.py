"""GroupNorm, residual and activation in plain PyTorch: the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTS = ("none", "relu")


def channels_last(x: torch.Tensor) -> bool:
    """Whether the channels of a map [B, C, H, W] are contiguous, and results' are to be."""
    return x.stride(1) == 1 and not x.is_contiguous()


def laid(t: torch.Tensor, last: bool) -> torch.Tensor:
    """The same map, dense, with its channels or its pixels contiguous."""
    return t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if last else t.contiguous()


def group_norm_act(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    act: str = "none",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y = act((x - mean) / sqrt(var + eps) * weight + bias + residual), moments over a group's
    channels and all pixels; the variance is the biased one."""
    dtype = torch.float32
    for t in (x, weight, bias, residual):
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    if x.numel():
        rows = x.to(dtype).reshape(x.shape[0] * groups, -1)
        # torch's group_norm takes the variance from the mean of the squares, which loses it all
        # where the mean is large.
        y = F.layer_norm(rows, rows.shape[-1:], eps=eps).view(x.shape)
    else:
        y = x.to(dtype)
    shape = (-1, 1, 1)
    if weight is not None:
        y = y * weight.to(dtype).view(shape)
    if bias is not None:
        y = y + bias.to(dtype).view(shape)
    if residual is not None:
        y = y + residual.to(dtype)
    if act == "relu":
        y = F.relu(y)
    if out_dtype is None:
        out_dtype = x.dtype
        if residual is not None:
            out_dtype = torch.promote_types(out_dtype, residual.dtype)
    return laid(y.to(out_dtype), channels_last(x))


def stats(x: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """[B, groups, 2]: mean and 1 / sqrt(var + eps)."""
    rows = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(x.shape[0], groups, -1)
    if rows.shape[-1] == 0:
        rows = rows.new_zeros(*rows.shape[:2], 1)
    mean, var = rows.mean(-1), rows.var(-1, correction=0)
    return torch.stack((mean, torch.rsqrt(var + eps)), -1)
