"""GroupNorm, residual and activation in plain PyTorch: the definition."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

ACTS = ("none", "relu")


class Call(NamedTuple):
    """The arguments of `vitfast::group_norm_act` before `backend`, in the order of its schema.

    Args:
        x, groups, weight, bias, eps, residual, act: as in `group_norm_act`.
        out_dtype: dtype of the result; None for that of x + residual.
        save_stats: whether each group's mean and 1 / sqrt(var + eps), [B, groups, 2] in float32
            (float64 for float64), are returned as well; else an empty tensor is.
    """

    x: torch.Tensor
    groups: int
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    residual: torch.Tensor | None
    act: str
    out_dtype: torch.dtype | None
    save_stats: bool

    @property
    def result_dtype(self) -> torch.dtype:
        """The dtype of the result."""
        return self.out_dtype or result_dtype(self.x, self.residual)


class BackwardCall(NamedTuple):
    """The arguments of `vitfast::group_norm_act_backward` before `backend`, in its order.

    Args:
        grad: [B, C, H, W], of the result and in its dtype, any strides.
        y: the result, where a ReLU was behind it: no gradient passes where it is 0.
        residual_dtype: dtype of the residual's gradient; None where none is wanted.
        stats: as the forward returned them.
        Others: as in `Call`.
    """

    grad: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    groups: int
    eps: float
    residual_dtype: torch.dtype | None
    stats: torch.Tensor

    @property
    def forward(self) -> Call:
        """A forward with this backward; its residual is empty, of the right dtype."""
        residual = None
        if self.residual_dtype is not None:
            residual = self.grad.new_empty(0, dtype=self.residual_dtype)
        return Call(
            self.x, self.groups, self.weight, self.bias, self.eps, residual,
            "none" if self.y is None else "relu", self.grad.dtype, save_stats=True,
        )  # fmt: skip


def result_dtype(x: torch.Tensor, residual: torch.Tensor | None) -> torch.dtype:
    """The dtype of x + residual."""
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


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
    return laid(y.to(out_dtype or result_dtype(x, residual)), channels_last(x))


def stats(x: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """[B, groups, 2]: mean and 1 / sqrt(var + eps)."""
    rows = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(x.shape[0], groups, -1)
    if rows.shape[-1] == 0:
        rows = rows.new_zeros(*rows.shape[:2], 1)
    mean, var = rows.mean(-1), rows.var(-1, correction=0)
    return torch.stack((mean, torch.rsqrt(var + eps)), -1)
