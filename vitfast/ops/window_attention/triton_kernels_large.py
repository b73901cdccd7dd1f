"""The backward of windows of more than one tile: gradients of queries, of keys, of the table.

Three passes, each of which owns what it sums, in one order: no atomics, the same bits every time.
The first leaves the others each query's delta. Flops, a window of N tokens and a head: 10 N^2 D for
queries, 4 of them for delta; 8 for keys and values; 4 for the table.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitfast.ops.window_attention.triton_kernels import (
    LOG2E,
    apart,
    biases,
    borders,
    factor_of,
    grads_of,
    origin,
    position,
    put,
    rows_of,
    sides,
    summed,
    through_units,
    tokens,
    units,
)
from vitfast.runtime.triton import COUNTS


@triton.jit
def _state(
    stats_ptr,  # [2, windows, heads, N], ACC: shifts in units of log2, and sums
    w, windows, h, m, heads, N: tl.constexpr,
):  # fmt: skip
    """Shift and 1 / sum of queries m of window w.

    Where the forward ran on a backend that leaves no statistics, 1 / sum is NaN, and so is all
    that follows.
    """
    at = (tl.full([], w, tl.int64) * heads + h) * N + m
    shift = tl.load(stats_ptr + at, mask=m < N, other=0.0)
    at += tl.full([], windows, tl.int64) * heads * N
    total = tl.load(stats_ptr + at, mask=m < N, other=1.0)
    return shift, tl.where(total > 0, 1.0 / total, float("nan"))


@triton.jit
def _delta(
    delta_ptr,  # [windows, heads, N], ACC
    w, h, m, heads, N: tl.constexpr,
):  # fmt: skip
    """Delta of queries m of window w, as `queries_kernel` left it."""
    at = (tl.full([], w, tl.int64) * heads + h) * N + m
    return tl.load(delta_ptr + at, mask=m < N, other=0.0)


@triton.jit
def _weights(
    qkv_ptr,  # [B, H, W, 3, heads, D], strides qkv_b, qkv_y, qkv_x, qkv_3, qkv_h, qkv_d
    table_ptr,  # the table from `origin` on, or None
    pad_ptr,  # [3, heads, D], contiguous, dtype of qkv; None: zeros
    q, g, shift, inverse, m, position_m, side, bits, factor, first,
    w, b, h, high, wide, shift_y, shift_x, qkv_b, qkv_y, qkv_x, qkv_3, qkv_h, qkv_d, table_p,
    width, column, WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr,
    COSINE: tl.constexpr, SHIFTED: tl.constexpr, ROLL_FIRST: tl.constexpr, GRID: tl.constexpr,
    TURNED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The keys from `first` on, their products with queries q, P and dP."""
    N: tl.constexpr = WH * WW
    n = first + tl.arange(0, BLOCK_N)
    side_k = sides(n, shift_y, shift_x, WH, WW)
    image, y, x, live, padding = tokens(
        n, w, high, wide, shift_y, shift_x, WH, WW, ROLL_FIRST, GRID
    )
    at = b * qkv_b + y * qkv_y + x * qkv_x + h * qkv_h
    k = rows_of(qkv_ptr, at, 1, qkv_3, qkv_d, pad_ptr, h, width, live, padding, column, D)
    k, length_k = units(k, ACC, COSINE)
    v = rows_of(qkv_ptr, at, 2, qkv_3, qkv_d, pad_ptr, h, width, live, padding, column, D)
    raw = tl.dot(q, tl.trans(k), out_dtype=ACC, input_precision=PRECISION)
    s = raw * (factor * LOG2E)
    if table_ptr is not None:
        s += biases(table_ptr, position_m, position(n, table_p, WW, TURNED), m < N, n < N, ACC)
    s = apart(s, side, side_k, bits, SHIFTED)
    if N % BLOCK_N != 0:
        s = tl.where((n < N)[None, :], s, float("-inf"))
    p = tl.exp2(s - shift[:, None]) * inverse[:, None]
    dp = tl.dot(g, tl.trans(v), out_dtype=ACC, input_precision=PRECISION)
    return k, raw, p, dp


@triton.jit(do_not_specialize=COUNTS)
def queries_kernel(
    qkv_ptr,  # [B, H, W, 3, heads, D], strides qkv_b, qkv_y, qkv_x, qkv_3, qkv_h, qkv_d
    table_ptr,  # [(2 WH - 1)(2 WW - 1), heads], strides table_p, table_h; or None
    pad_ptr,  # [3, heads, D], contiguous, dtype of qkv; None: zeros
    logit_ptr,  # [heads]; None: no cosines
    grad_ptr,  # [B, H, W, heads, D], contiguous
    stats_ptr,  # [2, windows, heads, N], ACC: shifts in units of log2, and sums
    delta_ptr,  # [windows, heads, N], ACC, written; or None
    dqkv_ptr,  # [B, H, W, 3, heads, D], contiguous, written; or None
    dscale_ptr,  # [programs, heads], ACC, written; or None
    windows, per, high, wide, heads, scale, shift_y, shift_x,
    qkv_b, qkv_y, qkv_x, qkv_3, qkv_h, qkv_d, table_p, table_h,
    WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
    SHIFTED: tl.constexpr, ROLL_FIRST: tl.constexpr, GRID: tl.constexpr, TURNED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Delta and gradients of a tile of queries of `per` windows.

    Delta is the mean of dP by the weights P, so that dS = P (dP - delta) sums
    to zero over a query's keys: what the table comes from may live on differences of its gradient
    (Swin V2's MLP does), which are far below the rounding of the forward's output. So all keys are
    taken twice, first for delta.
    """
    N: tl.constexpr = WH * WW
    COSINE: tl.constexpr = logit_ptr is not None
    TILES: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    h = (tl.program_id(0) % heads).to(tl.int64)
    m = tl.program_id(0) // heads % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(0) // heads // TILES
    column = tl.arange(0, BLOCK_D)
    factor = factor_of(scale, logit_ptr, h, ACC)
    width = tl.full([], heads, tl.int64) * D
    position_m = m
    if table_ptr is not None:
        table_ptr = origin(table_ptr, h, table_p, table_h, WH, WW)
        position_m = position(m, table_p, WW, TURNED)
    if dscale_ptr is not None:
        cosines = tl.zeros([BLOCK_M], ACC)
    side = sides(m, shift_y, shift_x, WH, WW)
    for w in range(part * per, tl.minimum(windows, part * per + per)):
        bits = borders(w, high, wide, WH, WW)
        b, y, x, live, padding = tokens(
            m, w, high, wide, shift_y, shift_x, WH, WW, ROLL_FIRST, GRID
        )
        at = b * qkv_b + y * qkv_y + x * qkv_x + h * qkv_h
        q = rows_of(qkv_ptr, at, 0, qkv_3, qkv_d, pad_ptr, h, width, live, padding, column, D)
        unit_q, inverse_q = units(q, ACC, COSINE)
        at = (b * high + y) * wide + x
        g = grads_of(grad_ptr, at * width + h * D, live, column, D)
        shift, inverse = _state(stats_ptr, w, windows, h, m, heads, N)
        weight = tl.zeros([BLOCK_M], ACC)
        delta = weight
        for first in range(0, N, BLOCK_N):
            k, raw, p, dp = _weights(
                qkv_ptr, table_ptr, pad_ptr, unit_q, g, shift, inverse, m, position_m, side, bits,
                factor, first, w, b, h, high, wide, shift_y, shift_x, qkv_b, qkv_y, qkv_x, qkv_3,
                qkv_h, qkv_d, table_p, width, column, WH, WW, D, ACC, COSINE, SHIFTED, ROLL_FIRST,
                GRID, TURNED, PRECISION, BLOCK_N,
            )  # fmt: skip
            weight += tl.sum(p, 1)
            delta += tl.sum(p * dp, 1)
        delta /= tl.where(m < N, weight, 1.0)
        if delta_ptr is not None:
            to = (tl.full([], w, tl.int64) * heads + h) * N + m
            tl.store(delta_ptr + to, delta, mask=m < N)
        if (dqkv_ptr is not None) or (dscale_ptr is not None):
            dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)
            for first in range(0, N, BLOCK_N):
                k, raw, p, dp = _weights(
                    qkv_ptr, table_ptr, pad_ptr, unit_q, g, shift, inverse, m, position_m, side,
                    bits, factor, first, w, b, h, high, wide, shift_y, shift_x, qkv_b, qkv_y,
                    qkv_x, qkv_3, qkv_h, qkv_d, table_p, width, column, WH, WW, D, ACC, COSINE,
                    SHIFTED, ROLL_FIRST, GRID, TURNED, PRECISION, BLOCK_N,
                )  # fmt: skip
                p *= dp - delta[:, None]
                if dscale_ptr is not None:
                    cosines += tl.sum(p * raw, 1)
                dq = tl.dot(p.to(k.dtype), k, acc=dq, out_dtype=ACC, input_precision=PRECISION)
        if dqkv_ptr is not None:
            dq = through_units(dq * factor, q, inverse_q, COSINE)
            put(dqkv_ptr, dq, at * 3 * width + h * D, live, column, D)
    first = (tl.program_id(0) // heads).to(tl.int64)
    if dscale_ptr is not None:
        tl.store(dscale_ptr + first * heads + h, tl.sum(cosines, 0))


@triton.jit(do_not_specialize=COUNTS)
def keys_kernel(
    qkv_ptr,  # [B, H, W, 3, heads, D], strides qkv_b, qkv_y, qkv_x, qkv_3, qkv_h, qkv_d
    table_ptr,  # [(2 WH - 1)(2 WW - 1), heads], strides table_p, table_h; or None
    pad_ptr,  # [3, heads, D], contiguous, dtype of qkv; None: zeros
    logit_ptr,  # [heads]; None: no cosines
    grad_ptr,  # [B, H, W, heads, D], contiguous
    stats_ptr,  # [2, windows, heads, N], ACC: shifts in units of log2, and sums
    delta_ptr,  # [windows, heads, N], ACC
    dqkv_ptr,  # [B, H, W, 3, heads, D], contiguous, written; or None
    dpad_ptr,  # [programs, 2, heads, D], ACC, written: of k and v; or None
    windows, per, high, wide, heads, scale, shift_y, shift_x,
    qkv_b, qkv_y, qkv_x, qkv_3, qkv_h, qkv_d, table_p, table_h,
    WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
    SHIFTED: tl.constexpr, ROLL_FIRST: tl.constexpr, GRID: tl.constexpr, TURNED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values of `per` windows."""
    N: tl.constexpr = WH * WW
    COSINE: tl.constexpr = logit_ptr is not None
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    h = (tl.program_id(0) % heads).to(tl.int64)
    n = tl.program_id(0) // heads % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(0) // heads // TILES
    column = tl.arange(0, BLOCK_D)
    factor = factor_of(scale, logit_ptr, h, ACC)
    width = tl.full([], heads, tl.int64) * D
    if table_ptr is not None:
        table_ptr = origin(table_ptr, h, table_p, table_h, WH, WW)
        position_n = -position(n, table_p, WW, TURNED)
    if dpad_ptr is not None:
        sum_k = tl.zeros([BLOCK_D], ACC)
        sum_v = sum_k
    side = sides(n, shift_y, shift_x, WH, WW)
    for w in range(part * per, tl.minimum(windows, part * per + per)):
        bits = borders(w, high, wide, WH, WW)
        b, y, x, live, padding = tokens(
            n, w, high, wide, shift_y, shift_x, WH, WW, ROLL_FIRST, GRID
        )
        at = b * qkv_b + y * qkv_y + x * qkv_x + h * qkv_h
        k = rows_of(qkv_ptr, at, 1, qkv_3, qkv_d, pad_ptr, h, width, live, padding, column, D)
        v = rows_of(qkv_ptr, at, 2, qkv_3, qkv_d, pad_ptr, h, width, live, padding, column, D)
        unit_k, inverse_k = units(k, ACC, COSINE)
        dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
        dv = tl.zeros([BLOCK_N, BLOCK_D], ACC)
        for first in range(0, N, BLOCK_M):
            m = first + tl.arange(0, BLOCK_M)
            side_q = sides(m, shift_y, shift_x, WH, WW)
            image, yq, xq, live_q, padding_q = tokens(
                m, w, high, wide, shift_y, shift_x, WH, WW, ROLL_FIRST, GRID
            )
            at_q = b * qkv_b + yq * qkv_y + xq * qkv_x + h * qkv_h
            q = rows_of(
                qkv_ptr, at_q, 0, qkv_3, qkv_d, pad_ptr, h, width, live_q, padding_q, column, D
            )
            q, length_q = units(q, ACC, COSINE)
            at_q = ((b * high + yq) * wide + xq) * width + h * D
            g = grads_of(grad_ptr, at_q, live_q, column, D)
            shift, inverse = _state(stats_ptr, w, windows, h, m, heads, N)
            delta = _delta(delta_ptr, w, h, m, heads, N)
            s = tl.dot(unit_k, tl.trans(q), out_dtype=ACC, input_precision=PRECISION)
            s *= factor * LOG2E
            if table_ptr is not None:
                s += biases(
                    table_ptr, position_n, -position(m, table_p, WW, TURNED), n < N, m < N, ACC
                )
            s = apart(s, side, side_q, bits, SHIFTED)
            p = tl.exp2(s - shift[None, :]) * inverse[None, :]
            dv = tl.dot(p.to(g.dtype), g, acc=dv, out_dtype=ACC, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(g), out_dtype=ACC, input_precision=PRECISION)
            ds = (p * (dp - delta[None, :])).to(q.dtype)
            dk = tl.dot(ds, q, acc=dk, out_dtype=ACC, input_precision=PRECISION)
        dk = through_units(dk * factor, k, inverse_k, COSINE)
        if dqkv_ptr is not None:
            at = ((b * high + y) * wide + x) * 3 * width + h * D
            put(dqkv_ptr + width, dk, at, live, column, D)
            put(dqkv_ptr + 2 * width, dv, at, live, column, D)
        if dpad_ptr is not None:
            sum_k += summed(dk, padding)
            sum_v += summed(dv, padding)
    if dpad_ptr is not None:
        at = (tl.program_id(0) // heads).to(tl.int64) * 2 * width + h * D + column
        tl.store(dpad_ptr + at, sum_k, mask=column < D)
        tl.store(dpad_ptr + width + at, sum_v, mask=column < D)


@triton.jit(do_not_specialize=COUNTS)
def bias_kernel(
    qkv_ptr,  # [B, H, W, 3, heads, D], strides qkv_b, qkv_y, qkv_x, qkv_3, qkv_h, qkv_d
    table_ptr,  # [(2 WH - 1)(2 WW - 1), heads], strides table_p, table_h
    pad_ptr,  # [3, heads, D], contiguous, dtype of qkv; None: zeros
    logit_ptr,  # [heads]; None: no cosines
    grad_ptr,  # [B, H, W, heads, D], contiguous
    stats_ptr,  # [2, windows, heads, N], ACC: shifts in units of log2, and sums
    delta_ptr,  # [windows, heads, N], ACC
    dbias_ptr,  # [parts, heads, N, N], ACC, written
    windows, per, high, wide, heads, scale, shift_y, shift_x,
    qkv_b, qkv_y, qkv_x, qkv_3, qkv_h, qkv_d, table_p, table_h,
    WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
    SHIFTED: tl.constexpr, ROLL_FIRST: tl.constexpr, GRID: tl.constexpr, TURNED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores on one tile of one head, over `per` windows."""
    N: tl.constexpr = WH * WW
    COSINE: tl.constexpr = logit_ptr is not None
    ACROSS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M * ACROSS
    h = (tl.program_id(0) % heads).to(tl.int64)
    tile = tl.program_id(0) // heads % TILES
    part = tl.program_id(0) // heads // TILES
    m = tile // ACROSS * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % ACROSS * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    factor = factor_of(scale, logit_ptr, h, ACC) * LOG2E
    width = tl.full([], heads, tl.int64) * D
    table_ptr = origin(table_ptr, h, table_p, table_h, WH, WW)
    position_m = position(m, table_p, WW, TURNED)
    bias = biases(table_ptr, position_m, position(n, table_p, WW, TURNED), m < N, n < N, ACC)
    side = sides(m, shift_y, shift_x, WH, WW)
    side_k = sides(n, shift_y, shift_x, WH, WW)
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for w in range(part * per, tl.minimum(windows, part * per + per)):
        bits = borders(w, high, wide, WH, WW)
        b, y, x, live, padding = tokens(
            m, w, high, wide, shift_y, shift_x, WH, WW, ROLL_FIRST, GRID
        )
        image, yk, xk, live_k, padding_k = tokens(
            n, w, high, wide, shift_y, shift_x, WH, WW, ROLL_FIRST, GRID
        )
        at = b * qkv_b + y * qkv_y + x * qkv_x + h * qkv_h
        q = rows_of(qkv_ptr, at, 0, qkv_3, qkv_d, pad_ptr, h, width, live, padding, column, D)
        q, length_q = units(q, ACC, COSINE)
        at = b * qkv_b + yk * qkv_y + xk * qkv_x + h * qkv_h
        k = rows_of(qkv_ptr, at, 1, qkv_3, qkv_d, pad_ptr, h, width, live_k, padding_k, column, D)
        k, length_k = units(k, ACC, COSINE)
        v = rows_of(qkv_ptr, at, 2, qkv_3, qkv_d, pad_ptr, h, width, live_k, padding_k, column, D)
        at = ((b * high + y) * wide + x) * width + h * D
        g = grads_of(grad_ptr, at, live, column, D)
        shift, inverse = _state(stats_ptr, w, windows, h, m, heads, N)
        delta = _delta(delta_ptr, w, h, m, heads, N)
        s = tl.dot(q, tl.trans(k), out_dtype=ACC, input_precision=PRECISION) * factor + bias
        s = apart(s, side, side_k, bits, SHIFTED)
        p = tl.exp2(s - shift[:, None]) * inverse[:, None]
        dp = tl.dot(g, tl.trans(v), out_dtype=ACC, input_precision=PRECISION)
        total += p * (dp - delta[:, None])
    at = ((part.to(tl.int64) * heads + h) * N + m)[:, None] * N + n[None, :]
    tl.store(dbias_ptr + at, total, mask=(m < N)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def fold_kernel(
    dbias_ptr,  # [heads, N, N], float32 or float64
    dtable_ptr,  # [(2 WH - 1)(2 WW - 1), heads], contiguous, written
    heads, WH: tl.constexpr, WW: tl.constexpr, ACC: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The table's gradient from that of the scores: sums over pairs of one relative position."""
    N: tl.constexpr = WH * WW
    ACROSS: tl.constexpr = 2 * WW - 1
    ENTRIES: tl.constexpr = (2 * WH - 1) * ACROSS
    TILES: tl.constexpr = (ENTRIES + BLOCK_T - 1) // BLOCK_T
    h = (tl.program_id(0) // TILES).to(tl.int64)
    t = tl.program_id(0) % TILES * BLOCK_T + tl.arange(0, BLOCK_T)
    down, right = t // ACROSS - (WH - 1), t % ACROSS - (WW - 1)
    total = tl.zeros([BLOCK_T], ACC)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        y, x = n[None, :] // WW + down[:, None], n[None, :] % WW + right[:, None]
        there = (y >= 0) & (y < WH) & (x >= 0) & (x < WW)
        there &= (t < ENTRIES)[:, None] & (n < N)[None, :]
        at = (h * N + y * WW + x) * N + n[None, :]
        total += tl.sum(tl.load(dbias_ptr + at, mask=there, other=0.0), 1)
    at = t.to(tl.int64) * heads + h
    tl.store(dtable_ptr + at, total.to(dtable_ptr.dtype.element_ty), mask=t < ENTRIES)
