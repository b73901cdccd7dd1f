"""Attention within the windows of a map in Triton, forward and for windows of one tile backward.

Floors, a window of N tokens: 4 N^2 D flops a head forward and 10 backward; 4 tokens of D elements
are read and written forward and 7 backward. A window of 49 tokens is bound by memory: 98 flops for
each 2-byte element. There a program takes one head and several windows, gathers the bias once, and
asks for no more of memory than these floors. Windows of more than a tile take the passes of
triton_kernels_large.py: 18 N^2 D flops, and 4 more where the bias has a gradient.

Scores are in units of log2. A head dim is padded to a power of two: Swin's are 32. Index
arithmetic does what in timm are a roll, a padding, a partition, a gather of the bias and a mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitfast.ops.window_attention.reference import LARGEST_SCALE, MASKED
from vitfast.runtime.triton import COUNTS

LOG2E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(MASKED * 1.4426950408889634)
LARGEST = tl.constexpr(LARGEST_SCALE * 1.4426950408889634)
SHORTEST = tl.constexpr(1e-12)
"""Least length that a vector is divided by, as in torch.nn.functional.normalize."""


@triton.jit
def place(i, size, padded, shift, ROLL_FIRST: tl.constexpr):
    """Row or column of the map under one of the shifted and padded map; -1 in the padding."""
    ring = padded
    if ROLL_FIRST:
        ring = size
    at = i + shift
    at = tl.where(at < ring, at, at - ring)
    return tl.where((i < ring) & (at < size), at, -1)


@triton.jit
def tokens(
    n, w, high, wide, shift_y, shift_x, WH: tl.constexpr, WW: tl.constexpr,
    ROLL_FIRST: tl.constexpr, GRID: tl.constexpr,
):  # fmt: skip
    """Of tokens n of window number w: image, row and column, whether in the map or padding."""
    down, across = tl.cdiv(high, WH), tl.cdiv(wide, WW)
    w = tl.full([], w, tl.int32)
    b, w = w // (down * across), w % (down * across)
    if GRID:
        y, x = n // WW * down + w // across, n % WW * across + w % across
    else:
        y = place(w // across * WH + n // WW, high, down * WH, shift_y, ROLL_FIRST)
        x = place(w % across * WW + n % WW, wide, across * WW, shift_x, ROLL_FIRST)
    inside, real = n < WH * WW, (y >= 0) & (x >= 0)
    return b.to(tl.int64), y.to(tl.int64), x.to(tl.int64), inside & real, inside & ~real


@triton.jit
def sides(n, shift_y, shift_x, WH: tl.constexpr, WW: tl.constexpr):
    """Bits for tokens that a shift brought to a border window from the map's other end."""
    return (n // WW >= WH - shift_y).to(tl.int32) * 2 + (n % WW >= WW - shift_x).to(tl.int32)


@triton.jit
def borders(w, high, wide, WH: tl.constexpr, WW: tl.constexpr):
    """The bits of `sides` that count in window number w: those of the last row and column."""
    down, across = tl.cdiv(high, WH), tl.cdiv(wide, WW)
    w = tl.full([], w, tl.int32) % (down * across)
    return (w // across == down - 1).to(tl.int32) * 2 + (w % across == across - 1).to(tl.int32)


@triton.jit
def apart(s, rows, columns, bits, SHIFTED: tl.constexpr):
    """Scores in units of log2, less 100 natural ones between tokens of different sides."""
    if SHIFTED:
        s += tl.where((rows & bits)[:, None] != (columns & bits)[None, :], HIDDEN, 0.0)
    return s


@triton.jit
def position(n, table_p, WW: tl.constexpr, TURNED: tl.constexpr):
    """Where tokens stand in the table of biases: a query's less a key's, plus `origin`.

    TURNED: the table is [heads, positions], and its offsets are in 32 bits, of which a tile of them
    takes half the registers.
    """
    at = n // WW * (2 * WW - 1) + n % WW
    if not TURNED:
        at = at.to(tl.int64) * table_p
    return at


@triton.jit
def origin(
    table_ptr,  # [(2 WH - 1)(2 WW - 1), heads], strides table_p, table_h
    h, table_p, table_h, WH: tl.constexpr, WW: tl.constexpr,
):  # fmt: skip
    """The table's entry for a token and itself."""
    middle: tl.constexpr = (WH - 1) * (2 * WW - 1) + WW - 1
    return table_ptr + h * table_h + tl.full([], middle, tl.int64) * table_p


@triton.jit
def biases(
    middle_ptr,  # the table from `origin` on
    rows, columns, real_rows, real_columns, ACC: tl.constexpr,
):  # fmt: skip
    """[rows, columns] of biases in units of log2, from positions (queries', or keys' negated)."""
    mask = real_rows[:, None] & real_columns[None, :]
    at = rows[:, None] - columns[None, :]
    return tl.load(middle_ptr + at, mask=mask, other=0.0).to(ACC) * LOG2E


@triton.jit
def rows_of(
    qkv_ptr,  # [B, H, W, 3, heads, D], strides qkv_b, qkv_y, qkv_x, qkv_3, qkv_h, qkv_d
    at, PART: tl.constexpr, step, step_d,
    pad_ptr,  # [3, heads, D], contiguous, dtype of qkv; None: zeros
    h, width, live, padding, column, D: tl.constexpr,
):  # fmt: skip
    """q (0), k (1) or v (2) of tokens, [tokens, BLOCK_D]; one row for all padding; else zeros."""
    inside = column < D
    at = (at + PART * tl.full([], step, tl.int64))[:, None]
    at += column.to(tl.int64)[None, :] * step_d
    x = tl.load(qkv_ptr + at, mask=live[:, None] & inside[None, :], other=0.0)
    if pad_ptr is not None:
        row = tl.load(pad_ptr + PART * width + h * D + column, mask=inside, other=0.0)
        x = tl.where(padding[:, None], row.to(x.dtype)[None, :], x)
    return x


@triton.jit
def grads_of(
    grad_ptr,  # [B, H, W, heads, D], contiguous
    at, live, column, D: tl.constexpr,
):  # fmt: skip
    """Rows of the contiguous gradient; zeros for padding, of which there is no output."""
    mask = live[:, None] & (column < D)[None, :]
    return tl.load(grad_ptr + at[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def units(x, ACC: tl.constexpr, COSINE: tl.constexpr):
    """Rows of length 1 where attention is by cosine, and by what they were multiplied."""
    inverse = tl.zeros([x.shape[0]], ACC)
    if COSINE:
        wide = x.to(ACC)
        inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), SHORTEST)
        x = (wide * inverse[:, None]).to(x.dtype)
    return x, inverse


@triton.jit
def through_units(d, x, inverse, COSINE: tl.constexpr):
    """The gradient of rows x from that of `units`; a length below the least is a constant."""
    if COSINE:
        u = x.to(d.dtype) * inverse[:, None]
        along = tl.where(inverse * SHORTEST < 0.999, tl.sum(d * u, 1), 0.0)
        d = (d - u * along[:, None]) * inverse[:, None]
    return d


@triton.jit
def factor_of(
    scale,
    logit_ptr,  # [heads]; None: no cosines
    h, ACC: tl.constexpr,
):  # fmt: skip
    """What a head's products are multiplied by."""
    factor = scale
    if logit_ptr is not None:
        factor = tl.exp2(tl.minimum(tl.load(logit_ptr + h).to(ACC) * LOG2E, LARGEST))
    return factor


@triton.jit
def put(
    ptr,  # rows of D beside each other, at offsets `at`
    value, at, live, column, D: tl.constexpr,
):  # fmt: skip
    """Writes the rows of value, [tokens, BLOCK_D], that are in the map."""
    mask = live[:, None] & (column < D)[None, :]
    tl.store(ptr + at[:, None] + column[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def summed(d, padding):
    """[BLOCK_D]: the gradient of the row that all padding is."""
    return tl.sum(tl.where(padding[:, None], d, 0.0), 0)


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    qkv_ptr,  # [B, H, W, 3, heads, D], strides qkv_b, qkv_y, qkv_x, qkv_3, qkv_h, qkv_d
    table_ptr,  # [(2 WH - 1)(2 WW - 1), heads], strides table_p, table_h; or None
    pad_ptr,  # [3, heads, D], contiguous, dtype of qkv; None: zeros
    logit_ptr,  # [heads]; None: no cosines
    out_ptr,  # [B, H, W, heads, D], contiguous, written
    stats_ptr,  # [2, windows, heads, N], ACC: shifts in units of log2, and sums, written; or None
    windows, per, high, wide, heads, scale, shift_y, shift_x,
    qkv_b, qkv_y, qkv_x, qkv_3, qkv_h, qkv_d, table_p, table_h,
    WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
    SHIFTED: tl.constexpr, ROLL_FIRST: tl.constexpr, GRID: tl.constexpr, TURNED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The result of a tile of queries of `per` windows, over all keys of each.

    Statistics are each row's shift, and the sum of its weights relative to it.
    """
    N: tl.constexpr = WH * WW
    COSINE: tl.constexpr = logit_ptr is not None
    TILES: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    h = (tl.program_id(0) % heads).to(tl.int64)
    m = tl.program_id(0) // heads % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(0) // heads // TILES
    column = tl.arange(0, BLOCK_D)
    factor = factor_of(scale, logit_ptr, h, ACC) * LOG2E
    width = tl.full([], heads, tl.int64) * D
    if table_ptr is not None:
        table_ptr = origin(table_ptr, h, table_p, table_h, WH, WW)
        position_m = position(m, table_p, WW, TURNED)
        if N <= BLOCK_N:
            n = tl.arange(0, BLOCK_N)
            bias = biases(
                table_ptr, position_m, position(n, table_p, WW, TURNED), m < N, n < N, ACC
            )
    side = sides(m, shift_y, shift_x, WH, WW)
    for w in range(part * per, tl.minimum(windows, part * per + per)):
        bits = borders(w, high, wide, WH, WW)
        b, y, x, live, padding = tokens(
            m, w, high, wide, shift_y, shift_x, WH, WW, ROLL_FIRST, GRID
        )
        at = b * qkv_b + y * qkv_y + x * qkv_x + h * qkv_h
        q = rows_of(qkv_ptr, at, 0, qkv_3, qkv_d, pad_ptr, h, width, live, padding, column, D)
        q, length_q = units(q, ACC, COSINE)
        shift = tl.full([BLOCK_M], float("-inf"), ACC)
        total = tl.zeros([BLOCK_M], ACC)
        o = tl.zeros([BLOCK_M, BLOCK_D], ACC)
        for first in range(0, N, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            side_k = sides(n, shift_y, shift_x, WH, WW)
            image, yk, xk, live_k, padding_k = tokens(
                n, w, high, wide, shift_y, shift_x, WH, WW, ROLL_FIRST, GRID
            )
            at_k = b * qkv_b + yk * qkv_y + xk * qkv_x + h * qkv_h
            k = rows_of(
                qkv_ptr, at_k, 1, qkv_3, qkv_d, pad_ptr, h, width, live_k, padding_k, column, D
            )
            k, length_k = units(k, ACC, COSINE)
            s = tl.dot(q, tl.trans(k), out_dtype=ACC, input_precision=PRECISION) * factor
            if table_ptr is not None:
                if N > BLOCK_N:
                    bias = biases(
                        table_ptr, position_m, position(n, table_p, WW, TURNED), m < N, n < N, ACC
                    )
                s += bias
            s = apart(s, side, side_k, bits, SHIFTED)
            if N % BLOCK_N != 0:
                s = tl.where((n < N)[None, :], s, float("-inf"))
            higher = tl.maximum(shift, tl.max(s, 1))
            rescale = tl.exp2(shift - higher)
            p = tl.exp2(s - higher[:, None])
            total = total * rescale + tl.sum(p, 1)
            v = rows_of(
                qkv_ptr, at_k, 2, qkv_3, qkv_d, pad_ptr, h, width, live_k, padding_k, column, D
            )
            o = tl.dot(
                p.to(v.dtype), v, acc=o * rescale[:, None], out_dtype=ACC, input_precision=PRECISION
            )
            shift = higher
        at = ((b * high + y) * wide + x) * heads * D + h * D
        put(out_ptr, o / total[:, None], at, live, column, D)
        if stats_ptr is not None:
            at = (tl.full([], w, tl.int64) * heads + h) * N + m
            tl.store(stats_ptr + at, shift, mask=m < N)
            at += tl.full([], windows, tl.int64) * heads * N
            tl.store(stats_ptr + at, total, mask=m < N)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    qkv_ptr,  # [B, H, W, 3, heads, D], strides qkv_b, qkv_y, qkv_x, qkv_3, qkv_h, qkv_d
    table_ptr,  # [(2 WH - 1)(2 WW - 1), heads], strides table_p, table_h; or None
    pad_ptr,  # [3, heads, D], contiguous, dtype of qkv; None: zeros
    logit_ptr,  # [heads]; None: no cosines
    grad_ptr,  # [B, H, W, heads, D], contiguous
    dqkv_ptr,  # [B, H, W, 3, heads, D], contiguous, written; or None
    dbias_ptr,  # [programs, heads, N, N], ACC, written; or None
    dpad_ptr,  # [windows, 2, heads, D], ACC, written: of k and v; or None
    dscale_ptr,  # [programs, heads], ACC, written; or None
    windows, per, high, wide, heads, scale, shift_y, shift_x,
    qkv_b, qkv_y, qkv_x, qkv_3, qkv_h, qkv_d, table_p, table_h,
    WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
    SHIFTED: tl.constexpr, ROLL_FIRST: tl.constexpr, GRID: tl.constexpr, TURNED: tl.constexpr,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """All gradients of `per` windows of at most WHOLE tokens; softmax is made again.

    Sums over the program's windows, for those wanted: dbias of the scores' gradients, and dscale of
    them times the cosines. Of each window, since sums kept from one to the next would take
    registers: dpad of k and v (a query in the padding has no output).
    """
    N: tl.constexpr = WH * WW
    COSINE: tl.constexpr = logit_ptr is not None
    h = (tl.program_id(0) % heads).to(tl.int64)
    part = tl.program_id(0) // heads
    n = tl.arange(0, WHOLE)
    column = tl.arange(0, BLOCK_D)
    factor = factor_of(scale, logit_ptr, h, ACC)
    width = tl.full([], heads, tl.int64) * D
    if table_ptr is not None:
        table_ptr = origin(table_ptr, h, table_p, table_h, WH, WW)
        where = position(n, table_p, WW, TURNED)
        bias = biases(table_ptr, where, where, n < N, n < N, ACC)
        bias = tl.where((n < N)[None, :], bias, float("-inf"))
    if dbias_ptr is not None:
        dbias = tl.zeros([WHOLE, WHOLE], ACC)
    if dscale_ptr is not None:
        cosines = tl.zeros([WHOLE], ACC)
    side = sides(n, shift_y, shift_x, WH, WW)
    for w in range(part * per, tl.minimum(windows, part * per + per)):
        bits = borders(w, high, wide, WH, WW)
        b, y, x, live, padding = tokens(
            n, w, high, wide, shift_y, shift_x, WH, WW, ROLL_FIRST, GRID
        )
        at = b * qkv_b + y * qkv_y + x * qkv_x + h * qkv_h
        q = rows_of(qkv_ptr, at, 0, qkv_3, qkv_d, pad_ptr, h, width, live, padding, column, D)
        k = rows_of(qkv_ptr, at, 1, qkv_3, qkv_d, pad_ptr, h, width, live, padding, column, D)
        v = rows_of(qkv_ptr, at, 2, qkv_3, qkv_d, pad_ptr, h, width, live, padding, column, D)
        at = (b * high + y) * wide + x
        g = grads_of(grad_ptr, at * width + h * D, live, column, D)
        unit_q, inverse_q = units(q, ACC, COSINE)
        unit_k, inverse_k = units(k, ACC, COSINE)
        raw = tl.dot(unit_q, tl.trans(unit_k), out_dtype=ACC, input_precision=PRECISION)
        s = raw * (factor * LOG2E)
        if table_ptr is not None:
            s += bias
        s = apart(s, side, side, bits, SHIFTED)
        if (N < WHOLE) and (table_ptr is None):
            s = tl.where((n < N)[None, :], s, float("-inf"))
        p = tl.exp2(s - tl.max(s, 1)[:, None])
        p *= 1.0 / tl.sum(p, 1)[:, None]
        at = at * 3 * width + h * D
        dv = tl.dot(tl.trans(p.to(g.dtype)), g, out_dtype=ACC, input_precision=PRECISION)
        if dqkv_ptr is not None:
            put(dqkv_ptr + 2 * width, dv, at, live, column, D)
        if dpad_ptr is not None:
            at_pad = dpad_ptr + tl.full([], w, tl.int64) * 2 * width + h * D + column
            tl.store(at_pad + width, summed(dv, padding), mask=column < D)
        dp = tl.dot(g, tl.trans(v), out_dtype=ACC, input_precision=PRECISION)
        p *= dp - tl.sum(p * dp, 1)[:, None]  # softmax's gradient
        if dbias_ptr is not None:
            dbias += p
        if dscale_ptr is not None:
            cosines += tl.sum(p * raw, 1)
        ds = p.to(k.dtype)
        dq = tl.dot(ds, unit_k, out_dtype=ACC, input_precision=PRECISION)
        if dqkv_ptr is not None:
            put(dqkv_ptr, through_units(dq * factor, q, inverse_q, COSINE), at, live, column, D)
        dk = tl.dot(tl.trans(ds), unit_q, out_dtype=ACC, input_precision=PRECISION) * factor
        dk = through_units(dk, k, inverse_k, COSINE)
        if dqkv_ptr is not None:
            put(dqkv_ptr + width, dk, at, live, column, D)
        if dpad_ptr is not None:
            tl.store(at_pad, summed(dk, padding), mask=column < D)
    first = part.to(tl.int64)
    if dbias_ptr is not None:
        at = ((first * heads + h) * N + n)[:, None] * N + n[None, :]
        tl.store(dbias_ptr + at, dbias, mask=(n < N)[:, None] & (n < N)[None, :])
    if dscale_ptr is not None:
        tl.store(dscale_ptr + first * heads + h, tl.sum(cosines, 0))
