"""Triton kernels of dwconv_norm: a convolution that normalises its rows where it holds them whole.

A program convolves a tile of pixels by `BLOCK` channels; where that is all of them, it normalises
them in registers.

Floors: 2 k k' flops an element, and as many reads from the first-level cache as taps, since Triton
does not share a pixel between taps in registers: about twice the time of the multiplications.

The dtype of what is computed is ACC: float32, or float64 of float64. Other tensors may have any
floating dtype each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitfast.runtime.triton import COUNTS


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    x_ptr,  # [B, H, W, C], strides x_outer, x_line, x_side, 1
    weight_ptr,  # [HEIGHT * WIDTH, C], contiguous, rounded to OPERAND
    bias_ptr,  # [C], rounded to OPERAND; or None
    norm_weight_ptr,  # [C], or None
    norm_bias_ptr,  # [C], or None
    y_ptr,  # [B, H, W, C], contiguous, written
    stats_ptr,  # [B * H * W, 2], ACC, written: mean and 1 / sqrt(var + eps); or None
    map_height, map_width, c, x_outer, x_line, x_side, eps,
    KIND: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, FLIPPED: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """A tile of DOWN x ACROSS pixels; x is rounded to OPERAND first.

    KIND 0, 1, 2: layer, rms, none. FLIPPED: taps in the opposite order, as for the gradient of x.
    """
    blocks = tl.cdiv(c, BLOCK)
    across, down = tl.cdiv(map_width, ACROSS), tl.cdiv(map_height, DOWN)
    tile = tl.program_id(0) // blocks
    b = (tile // across // down).to(tl.int64)
    pixel = tl.arange(0, DOWN * ACROSS)
    h = tile // across % down * DOWN + pixel // ACROSS
    w = tile % across * ACROSS + pixel % ACROSS
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < c
    x_ptr += b * x_outer
    tap_ptr = weight_ptr + column
    if FLIPPED:
        tap_ptr += (HEIGHT * WIDTH - 1) * c
    total = tl.zeros([DOWN * ACROSS, BLOCK], ACC)
    for i in range(HEIGHT):
        y = h + (i - HEIGHT // 2)
        line = y.to(tl.int64) * x_line
        for j in tl.range(0, WIDTH, loop_unroll_factor=UNROLL):
            x = w + (j - WIDTH // 2)
            exists = (y >= 0) & (y < map_height) & (x >= 0) & (x < map_width)
            at = line + x.to(tl.int64) * x_side
            value = tl.load(
                x_ptr + (at[:, None] + column[None, :]), mask=exists[:, None] & inside[None, :],
                other=0.0,
            )  # fmt: skip
            weight = tl.load(tap_ptr, mask=inside, other=0.0).to(ACC)
            total += value.to(OPERAND).to(ACC) * weight[None, :]
            if FLIPPED:
                tap_ptr -= c
            else:
                tap_ptr += c
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=inside, other=0.0).to(ACC)[None, :]
    live = (h < map_height) & (w < map_width)
    mask = live[:, None] & inside[None, :]
    row = (b * map_height + h) * map_width + w
    if KIND != 2:
        if KIND == 0:
            mean = tl.sum(total, axis=1) / c
            # What the mean's rounding left: the rows' sums then are as good as their elements.
            mean += tl.sum(tl.where(mask, total - mean[:, None], 0.0), axis=1) / c
            total = tl.where(mask, total - mean[:, None], 0.0)
        else:
            mean = tl.zeros([DOWN * ACROSS], ACC)
        rstd = 1.0 / tl.sqrt(tl.sum(total * total, axis=1) / c + eps)
        total *= rstd[:, None]
        if norm_weight_ptr is not None:
            total *= tl.load(norm_weight_ptr + column, mask=inside, other=0.0).to(ACC)[None, :]
        if norm_bias_ptr is not None:
            total += tl.load(norm_bias_ptr + column, mask=inside, other=0.0).to(ACC)[None, :]
        if stats_ptr is not None:
            tl.store(stats_ptr + row * 2, mean, mask=live)
            tl.store(stats_ptr + row * 2 + 1, rstd, mask=live)
    to = row[:, None] * c + column[None, :]
    tl.store(y_ptr + to, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def taps_kernel(
    grad_ptr,  # [B, H, W, C], strides grad_outer, grad_line, grad_side, 1
    x_ptr,  # [B, H, W, C], strides x_outer, x_line, x_side, 1
    dweight_ptr,  # [parts, HEIGHT * WIDTH, C], ACC, written
    dbias_ptr,  # [parts, C], ACC, written
    rows, map_height, map_width, c, per,
    grad_outer, grad_line, grad_side, x_outer, x_line, x_side,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr,
    TAPS: tl.constexpr, BLOCK: tl.constexpr, STRETCH: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Sums over `per` of the `rows` pixels of grad * x, a row a tap, and of grad.

    A stretch of pixels is added up by itself, so that long sums keep their accuracy.
    """
    blocks, groups = tl.cdiv(c, BLOCK), tl.cdiv(HEIGHT * WIDTH, TAPS)
    block, group = tl.program_id(0) % blocks, tl.program_id(0) // blocks % groups
    part = tl.program_id(0) // blocks // groups
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < c
    tap = group * TAPS + tl.arange(0, TAPS)
    i, j = tap // WIDTH - HEIGHT // 2, tap % WIDTH - WIDTH // 2
    at = i.to(tl.int64)[:, None] * x_line + j.to(tl.int64)[:, None] * x_side + column[None, :]
    wanted = (tap < HEIGHT * WIDTH)[:, None] & inside[None, :]
    dweight = tl.zeros([TAPS, BLOCK], ACC)
    dbias = tl.zeros([BLOCK], ACC)
    end = tl.minimum((part + 1) * per, rows)
    for first in range(part * per, end, STRETCH):
        weights = tl.zeros([TAPS, BLOCK], ACC)
        biases = tl.zeros([BLOCK], ACC)
        for row in tl.range(first, tl.minimum(first + STRETCH, end), loop_unroll_factor=UNROLL):
            w, h = row % map_width, row // map_width % map_height
            b = (row // map_width // map_height).to(tl.int64)
            to = b * grad_outer + h.to(tl.int64) * grad_line + w.to(tl.int64) * grad_side
            g = tl.load(grad_ptr + to + column, mask=inside, other=0.0).to(ACC)
            exists = (h + i >= 0) & (h + i < map_height) & (w + j >= 0) & (w + j < map_width)
            to = b * x_outer + h.to(tl.int64) * x_line + w.to(tl.int64) * x_side
            x = tl.load(x_ptr + to + at, mask=exists[:, None] & wanted, other=0.0)
            weights += x.to(OPERAND).to(ACC) * g[None, :]
            biases += g
        dweight += weights
        dbias += biases
    to = part.to(tl.int64) * (HEIGHT * WIDTH) + tap
    tl.store(dweight_ptr + to[:, None] * c + column[None, :], dweight, mask=wanted)
    if group == 0:
        tl.store(dbias_ptr + part.to(tl.int64) * c + column, dbias, mask=inside)
