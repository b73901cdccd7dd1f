"""Steps of the CPU's inference that work row by row, and how many rows go through at a time.

Nothing here checks what it is given: see `checks`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.plans import Norm

CHUNK_ROWS = 1024
"""Rows of a chunk. Measured on a Zen 3 EPYC with two threads, Swin-T at 448: 1.00 to 1.05 of the
best time, as good as noise, from 256 to 4096 rows, while the memory grows with them."""
WHOLE_ROWS = 2048
"""Up to so many rows go through as one chunk. Measured there, ViT-Ti at 672 (1765 tokens): 1.00 to
1.04 of the best time up to 2048 rows, 1.09 to 1.11 where 4096 and 8192 were allowed."""


def count(x: torch.Tensor) -> int:
    """Rows of x [..., C]."""
    return x.numel() // max(x.shape[-1], 1)


def add(
    x: torch.Tensor, branch: torch.Tensor, gamma: torch.Tensor | None, out: torch.Tensor
) -> None:
    norm_op.forward(norm_op.NONE, x, branch=branch, gamma=gamma, residual_out=out)


def add_normed(x: torch.Tensor, branch: torch.Tensor, norm: Norm, out: torch.Tensor) -> None:
    norm_op.forward(
        norm_op.KINDS[norm.kind],
        branch,
        weight=norm.weight,
        bias=norm.bias,
        eps=norm.eps,
        base=x,
        normed_out=out,
    )


def normalise(x: torch.Tensor, norm: Norm, out: torch.Tensor) -> torch.Tensor:
    norm_op.forward(
        norm_op.KINDS[norm.kind],
        x,
        weight=norm.weight,
        bias=norm.bias,
        eps=norm.eps,
        normed_out=out,
    )
    return out


def in_chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same consecutive rows of each, all or CHUNK_ROWS at a time."""
    rows = tensors[0].shape[0]
    step = rows if rows <= WHOLE_ROWS else CHUNK_ROWS
    for i in range(0, rows, max(step, 1)):
        chunk = slice(i, min(i + step, rows))
        yield tuple(part(t, chunk) for t in tensors)


def part(t: torch.Tensor, rows: slice) -> torch.Tensor:
    """t[rows]; a view costs more than a comparison."""
    return t if rows.start == 0 and rows.stop == t.shape[0] else t[rows]


def stripes(
    batch: int, high: int, wide: int, rows: int
) -> list[tuple[slice, list[tuple[int, int]]]]:
    """Some images and all of their lines, or one and so many rows at a time."""
    if high * wide <= WHOLE_ROWS:
        images = WHOLE_ROWS // (high * wide)
        starts = range(0, batch, images)
        return [(slice(i, min(i + images, batch)), [(0, high)]) for i in starts]
    step = max(1, rows // wide)
    lines = [(i, min(i + step, high)) for i in range(0, high, step)]
    return [(slice(i, i + 1), lines) for i in range(batch)]
