"""How maps lie in memory: channels beside each other, or planar, as a convolution's NCHW does."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vitfast.ops.common import norm as norm_op


def sizes(x: torch.Tensor) -> tuple[int, int, int]:
    """Images, positions, channels of [B, H, W, C] or [B, N, C]."""
    positions = x.shape[1] if x.ndim == 3 else x.shape[1] * x.shape[2]
    return x.shape[0], positions, x.shape[-1]


def is_planar(x: torch.Tensor) -> bool:
    """Whether x is a view of a contiguous tensor with the channels before the positions."""
    return not x.is_contiguous() and x.movedim(-1, 1).is_contiguous()


def empty(
    x: torch.Tensor, dtype: torch.dtype, allocate: Callable[..., torch.Tensor] = torch.empty
) -> torch.Tensor:
    """A tensor of x's shape, planar where x is, contiguous elsewhere."""
    planar = is_planar(x)
    t = allocate((x.movedim(-1, 1) if planar else x).shape, dtype=dtype, device=x.device)
    return t.movedim(1, -1) if planar else t


def planar_or_dense(x: torch.Tensor) -> tuple[bool, torch.Tensor]:
    """Whether x is planar, and x itself or, where no two strides address its rows, a copy."""
    planar = is_planar(x)
    return planar, x if planar else norm_op.dense(x)


def of_layout(t: torch.Tensor, planar: bool) -> torch.Tensor:
    """The tensor, or a copy of it, planar or with contiguous channels."""
    return t.movedim(-1, 1).contiguous().movedim(1, -1) if planar else norm_op.dense(t)


def steps(t: torch.Tensor, planar: bool) -> tuple[int, int, int]:
    """Strides of images, positions and channels of a tensor that `planar_or_dense` gave."""
    _, n, c = sizes(t)
    if planar:
        return n * c, 1, n
    return (n * c, c, 1) if t.is_contiguous() else (t.stride(0), t.stride(-2), 1)
