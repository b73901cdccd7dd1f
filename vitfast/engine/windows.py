"""A transformer block whose attention lies within windows of a map: Swin, Swin V2, MaxViT."""

from __future__ import annotations

import torch

from vitfast.engine import rows as by_rows
from vitfast.engine.steps import PreparedBlock
from vitfast.ops.window_attention import native as window_op
from vitfast.plans import split_packed
from vitfast.runtime import native


def run_windowed(steps: PreparedBlock, x: torch.Tensor) -> torch.Tensor:
    """The block on a map x [B, H W, C], from norm1 to the end in one chunk after the other.

    A chunk is some images, or some rows of windows of one. Only x and the result are as large as
    the map, and may be one: no row belongs to two windows.
    """
    attn, windows = steps.plan.attn, steps.windows
    assert windows is not None
    batch, tokens, channels = x.shape
    (high, wide), window, shift, grid = windows
    width = attn.proj.weight.shape[1]
    heads = (attn.heads, width // attn.heads)

    def run(
        rows: torch.Tensor, out: torch.Tensor, stripe: tuple[int, int] | None, high: int = high
    ) -> None:
        (qkv,) = steps.project(rows.view(-1, channels))
        qkv = qkv.view(len(rows) if stripe is None else 1, -1, wide, 3 * width)
        attended = native.empty((*qkv.shape[:3], *heads), qkv.dtype)
        window_op.run(
            split_packed(qkv, attn), attended, (high, wide), window, shift, steps.terms,
            grid=grid, stripe=stripe,
        )  # fmt: skip
        del qkv
        attended = attended.view(-1, width)
        steps.finish(rows.view(-1, channels), attended, out.view(-1, channels))

    out = steps.room(x)
    if tokens <= by_rows.WHOLE_ROWS:
        images = max(1, by_rows.WHOLE_ROWS // tokens)
        for rows, result in zip(x.contiguous().split(images), out.split(images), strict=True):
            run(rows, result, None)
        return out
    count = -(-high // window[0])
    step = max(1, by_rows.CHUNK_ROWS // (window[0] * wide))
    if grid:  # Every count-th row belongs to the same windows: some of each are a map, too.
        maps = (t.view(batch, window[0], count, wide, channels) for t in (x.contiguous(), out))
        for image, result in zip(*maps, strict=True):
            for first in range(0, count, step):
                rows = image[:, first : first + step].contiguous()
                both = native.empty(rows.shape, steps.stream)
                run(rows[None], both, None, rows.shape[0] * rows.shape[1])
                result[:, first : first + step] = both
        return out
    maps = (t.view(batch, high, wide, channels) for t in (x.contiguous(), out))
    for image, result in zip(*maps, strict=True):
        for first in range(0, count, step):
            stripe = first, min(first + step, count)
            # The stripe's rows of the map rolled back: those past its end are the first.
            begin, end = (min(i * window[0], high) + shift[0] % high for i in stripe)
            if end <= high:
                run(image[begin:end], result[begin:end], stripe)
                continue
            pieces = [slice(begin, high), slice(max(begin - high, 0), end - high)]
            rows = torch.cat([image[piece] for piece in pieces])
            both = native.empty(rows.shape, steps.stream)
            run(rows, both, stripe)
            sizes = [max(high - begin, 0), end - max(begin, high)]
            for piece, part in zip(pieces, both.split(sizes), strict=True):
                result[piece] = part
    return out
