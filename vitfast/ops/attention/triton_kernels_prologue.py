"""Triton kernels of norm and rotation of q and k, one pass each before the attention kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from vitfast.runtime.triton import COUNTS


@triton.jit
def _row_stats(x, inside, c: tl.constexpr, eps, NORM: tl.constexpr):
    """Mean and 1 / deviation of rows."""
    mean = tl.sum(x, axis=1) / c if NORM == 1 else tl.zeros_like(tl.sum(x, axis=1))
    d = tl.where(inside, x - mean[:, None], 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(d * d, axis=1) / c + eps)


@triton.jit
def _partner(column, HALF: tl.constexpr, D: tl.constexpr):
    """The column that a column is turned with, and the sign it comes with."""
    if HALF:
        low = column < D // 2
        return tl.where(low, column + D // 2, column - D // 2), tl.where(low, -1.0, 1.0)
    return column ^ 1, tl.where(column % 2 == 0, -1.0, 1.0)


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    x_ptr,  # [B, N, H, D], strides (x_b, x_n, x_h, x_d): q or k
    weight_ptr,  # [D], contiguous, or None
    bias_ptr,  # [D], contiguous, or None
    rope_ptr,  # [B, H, N - prefix, 2 D], strides (rope_b, rope_h, rope_n, rope_d), or None
    out_ptr,  # [B, N, H, D], contiguous; written
    rows, tokens, heads, prefix,
    x_b, x_n, x_h, x_d, rope_b, rope_h, rope_n, rope_d, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, NORM: tl.constexpr,
    HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out [B, N, H, D] contiguous; a row is one head of one token."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    live, inside = row < rows, column < D
    mask = live[:, None] & inside[None, :]
    h, n, b = row % heads, row // heads % tokens, row // heads // tokens
    at = (b * x_b + n * x_n + h * x_h)[:, None]
    y = tl.load(x_ptr + at + column[None, :] * x_d, mask=mask, other=0.0).to(ACC)
    if NORM > 0:
        mean, rstd = _row_stats(y, mask, D, eps, NORM)
        y = (y - mean[:, None]) * rstd[:, None]
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(ACC)[None, :]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(ACC)[None, :]
    if rope_ptr is not None:
        other, sign = _partner(column, HALF, D)
        z = tl.load(x_ptr + at + other[None, :] * x_d, mask=mask, other=0.0).to(ACC)
        if NORM > 0:
            z = (z - mean[:, None]) * rstd[:, None]
            if weight_ptr is not None:
                z *= tl.load(weight_ptr + other, mask=inside, other=0.0).to(ACC)[None, :]
            if bias_ptr is not None:
                z += tl.load(bias_ptr + other, mask=inside, other=0.0).to(ACC)[None, :]
        turned = mask & (n >= prefix)[:, None]
        at = (b * rope_b + h * rope_h + (n - prefix) * rope_n)[:, None]
        sin = tl.load(rope_ptr + at + column[None, :] * rope_d, mask=turned, other=0.0)
        cos = tl.load(rope_ptr + at + (column + D)[None, :] * rope_d, mask=turned, other=1.0)
        y = y * cos.to(ACC) + z * sign[None, :] * sin.to(ACC)
    tl.store(
        out_ptr + row[:, None] * D + column[None, :], y.to(out_ptr.dtype.element_ty), mask=mask
    )


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    grad_ptr,  # [B, N, H, D], contiguous
    x_ptr,  # [B, N, H, D], strides (x_b, x_n, x_h, x_d): q or k
    weight_ptr,  # [D], contiguous, or None
    rope_ptr,  # [B, H, N - prefix, 2 D], strides (rope_b, rope_h, rope_n, rope_d), or None
    dx_ptr,  # [B, N, H, D], strides (dx_b, dx_n, dx_h, 1); written
    dweight_ptr,  # [programs, D], contiguous, or None; written: each program's sums
    dbias_ptr,  # as dweight_ptr
    rows, tokens, heads, prefix, x_b, x_n, x_h, x_d, rope_b, rope_h, rope_n, rope_d,
    dx_b, dx_n, dx_h, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, NORM: tl.constexpr,
    HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx from grad [B, N, H, D] contiguous; sums of the weights' gradients [programs, D]."""
    first = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    other, sign = _partner(column, HALF, D)
    dweight = tl.zeros([BLOCK_D], ACC)
    dbias = tl.zeros([BLOCK_D], ACC)
    for block in range(first, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.arange(0, ROWS).to(tl.int64) + tl.full([], block, tl.int64) * ROWS
        live = row < rows
        mask = live[:, None] & inside[None, :]
        h, n, b = row % heads, row // heads % tokens, row // heads // tokens
        g = tl.load(grad_ptr + row[:, None] * D + column[None, :], mask=mask, other=0.0).to(ACC)
        if rope_ptr is not None:
            # The turn's transpose: what went to the partner comes back from it.
            turned = mask & (n >= prefix)[:, None]
            at = (b * rope_b + h * rope_h + (n - prefix) * rope_n)[:, None]
            cos = tl.load(rope_ptr + at + (column + D)[None, :] * rope_d, mask=turned, other=1.0)
            sin = tl.load(rope_ptr + at + other[None, :] * rope_d, mask=turned, other=0.0)
            z = tl.load(grad_ptr + row[:, None] * D + other[None, :], mask=mask, other=0.0).to(ACC)
            g = g * cos.to(ACC) - z * sign[None, :] * sin.to(ACC)
        if NORM > 0:
            at = (b * x_b + n * x_n + h * x_h)[:, None] + column[None, :] * x_d
            x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
            mean, rstd = _row_stats(x, mask, D, eps, NORM)
            xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
            if dbias_ptr is not None:
                dbias += tl.sum(g, axis=0)
            if dweight_ptr is not None:
                dweight += tl.sum(g * xhat, axis=0)
            if weight_ptr is not None:
                g *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(ACC)[None, :]
            d = g - xhat * (tl.sum(g * xhat, axis=1) / D)[:, None]
            if NORM == 1:
                d -= (tl.sum(g, axis=1) / D)[:, None]
            g = d * rstd[:, None]
        at = (b * dx_b + n * dx_n + h * dx_h)[:, None] + column[None, :]
        tl.store(dx_ptr + at, g.to(dx_ptr.dtype.element_ty), mask=mask)
    at = first.to(tl.int64) * D + column
    if dweight_ptr is not None:
        tl.store(dweight_ptr + at, dweight, mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + at, dbias, mask=inside)
