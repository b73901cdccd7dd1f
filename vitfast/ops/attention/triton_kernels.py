"""Flash attention in Triton, forward and backward (Dao et al. 2022; Rabe and Staats 2021).

Floors: 4 N^2 D flops a head forward and 10 backward (this backward: 14, since the gradients of q
and of k and v are separate passes, for the same bits every time), and one exponential for every
4 D flops; memory never decides beyond a few hundred tokens.

A head dim is D1 + D2 columns, D1 the largest power of two within it: 72 is 64 + 16, not 128.
Scores are in units of log2 unless something is added to them; then the sum has to be as the
reference has it (finfo.min masks), and the factor of log2(e) comes after the maximum is taken off.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitfast.ops.common.triton_dots import add_dot
from vitfast.runtime.triton import COUNTS

LOG2E = tl.constexpr(1.4426950408889634)
# Found by Lawson's iteration on the relative error.
COEFFICIENTS0 = tl.constexpr(0.99992807)
COEFFICIENTS1 = tl.constexpr(0.69326099)
COEFFICIENTS2 = tl.constexpr(0.24261117)
COEFFICIENTS3 = tl.constexpr(0.05517169)
LAZY_BY = tl.constexpr(8.0)
"""How many powers of two a weight may stand above the row's shift before the row is rescaled."""
LARGE = tl.constexpr(67108864.0)
"""Of a shift, see `_factor`."""
SMALLEST = tl.constexpr(1e-30)
"""Least factor of a score: 0 times a hidden one's -inf were NaN."""


@triton.jit
def _tile(
    ptr,  # [N, D], strides (stride_row, stride_d)
    row, rows, stride_row, stride_d, first, D: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """[rows, BLOCK] of a [N, D] matrix from column `first` on; zeros outside.

    WHOLE: all these rows exist.
    """
    column = first + tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_d
    if WHOLE:
        return tl.load(ptr + at, mask=(column < D)[None, :], other=0.0)
    return tl.load(ptr + at, mask=(row < rows)[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def _eighths(stride_b, stride_n, stride_h):
    """Strides that are multiples of 8, as the compiler then sees, so that loads stay wide.

    By itself Triton tells only multiples of 16 from other numbers: heads of 72 or 88 are none.
    """
    return stride_b // 8 * 8, stride_n // 8 * 8, stride_h // 8 * 8


@triton.jit
def _row_at(
    ptr,  # [N, ...], stride of rows `stride`
    row, stride,
):  # fmt: skip
    """The pointer to a row, with a row number that is a scalar."""
    return ptr + tl.full([], row, tl.int64) * stride


@triton.jit
def _put(
    ptr,  # [N, D], strides (stride_row, 1); written
    value, row, rows, stride_row, first, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`value` to rows of a [N, D] matrix from column `first` on; nothing outside."""
    column = first + tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * stride_row + column[None, :]
    mask = (row < rows)[:, None] & (column < D)[None, :]
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _product(
    a1, a2, b1, b2, ACC: tl.constexpr, D2: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """a b^T over both parts of the head dim."""
    s = tl.dot(a1, tl.trans(b1), out_dtype=ACC, input_precision=PRECISION)
    if D2 > 0:
        s = tl.dot(a2, tl.trans(b2), acc=s, out_dtype=ACC, input_precision=PRECISION)
    return s


@triton.jit
def _hide(s, m, n, keys, CAUSAL: tl.constexpr, TURNED: tl.constexpr):
    """-inf for keys n that are not there, or that come after queries m.

    TURNED: s is [keys, queries].
    """
    if TURNED:
        q, k = m[None, :], n[:, None]
    else:
        q, k = m[:, None], n[None, :]
    if CAUSAL:
        s = tl.where(k <= q, s, float("-inf"))
    return tl.where(k < keys, s, float("-inf"))


@triton.jit
def _with_terms(
    s, m, n, queries, keys,
    mask_ptr,  # [Nq, Nk] of this batch entry and head, strides (mask_q, mask_k), or None
    bias_ptr,  # [Nq, Nk] of this head, strides (bias_q, bias_k), or None
    mask_q, mask_k, bias_q, bias_k, scale, KEEP: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Scaled scores with mask and bias; as `_hide`."""
    if TURNED:
        q, k = m[None, :], n[:, None]
    else:
        q, k = m[:, None], n[None, :]
    live = (q < queries) & (k < keys)
    s = s * scale
    if mask_ptr is not None:
        at = q.to(tl.int64) * mask_q + k.to(tl.int64) * mask_k
        if KEEP:
            seen = tl.load(mask_ptr + at, mask=live, other=1)
            s = tl.where(seen != 0, s, float("-inf"))
        else:
            s += tl.load(mask_ptr + at, mask=live, other=0.0).to(s.dtype)
    if bias_ptr is not None:
        at = q.to(tl.int64) * bias_q + k.to(tl.int64) * bias_k
        s += tl.load(bias_ptr + at, mask=live, other=0.0).to(s.dtype)
    return s


@triton.jit
def _factor(shift, factor):
    """What the scores of rows with these shifts are multiplied by, in place of `factor`.

    s * factor - shift is one multiply-add, so that the rounding of the row's shift, up to half an
    ulp, stays in the exponent, where weights and their sum share it. From 2^26 on it might
    overflow; there the factor is the next power of two, with which nothing is rounded. Two float32
    scores as large are at least four powers of two apart, and their rounding in the product decides
    more about the weights.
    """
    if shift.dtype == tl.float64:
        return factor
    bits = (factor.to(tl.int32, bitcast=True) + 0x7FFFFF) & -0x800000
    return tl.where(tl.abs(shift) < LARGE, factor, bits.to(tl.float32, bitcast=True))


@triton.jit
def _distance(s, shift, ADDED: tl.constexpr):
    """s - shift in units of log2; a row that sees nothing has a shift of -inf and weights of 0."""
    if ADDED:
        return (s - tl.where(shift == float("-inf"), 0.0, shift)) * LOG2E
    return s - shift


@triton.jit
def _polynomial_exp2(x):
    """2^x for x < 127 on the multipliers instead of the special function unit; 0 below 2^-126.

    Relative error 7.5e-5, a third of float16's rounding: for weights that are rounded to half
    precision next. Adding 1.5 * 2^23 leaves the nearest whole number in the low bits, which go to
    the exponent; a conversion would run on the unit to be spared. The rest is a minimax cubic of
    2^f on [-1/2, 1/2] (as in FlashAttention-4, Zadouri et al. 2026).
    """
    near = tl.maximum(x, -127.0) + 12582912.0
    f = x - (near - 12582912.0)
    y = ((COEFFICIENTS3 * f + COEFFICIENTS2) * f + COEFFICIENTS1) * f + COEFFICIENTS0
    y = (y.to(tl.int32, bitcast=True) + (near.to(tl.int32, bitcast=True) << 23)).to(
        tl.float32, bitcast=True
    )
    return tl.where(x < -126.0, 0.0, y)


@triton.jit
def _shared_exp2(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """2^x, every second element as a polynomial: both units of a multiprocessor work at once."""
    a, b = tl.split(tl.reshape(x, [ROWS, COLUMNS // 2, 2]))
    return tl.reshape(tl.join(tl.exp2(a), _polynomial_exp2(b)), [ROWS, COLUMNS])


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    q_ptr,  # [B, Nq, H, D], strides (q_b, q_n, q_h, q_d)
    k_ptr,  # [B, Nk, H, D], strides (k_b, k_n, k_h, k_d)
    v_ptr,  # [B, Nk, H, D], strides (v_b, v_n, v_h, v_d)
    mask_ptr,  # [B, H, Nq, Nk], strides (mask_b, mask_h, mask_q, mask_k), or None; uint8 if KEEP
    bias_ptr,  # [H, Nq, Nk], strides (bias_h, bias_q, bias_k), or None
    out_ptr,  # [B, Nq, H, D], contiguous; written
    stats_ptr,  # [2, B, H, Nq], contiguous, or None; written: each row's shift, its weights' sum
    batch, heads, queries, keys, scale,
    q_b, q_n, q_h, q_d, k_b, k_n, k_h, k_d, v_b, v_n, v_h, v_d,
    mask_b, mask_h, mask_q, mask_k, bias_h, bias_q, bias_k,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ACC: tl.constexpr, KEEP: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LAZY: tl.constexpr, POLYNOMIAL: tl.constexpr, EIGHTHS: tl.constexpr,
):  # fmt: skip
    """out [B, Nq, H, D] of a tile of queries, over all keys.

    scale is not negative: the largest score has to be that of the largest product.

    EIGHTHS: strides are multiples of 8.
    LAZY: rows are rescaled only once one of them has grown by 2^8 (FlashAttention-4).
    POLYNOMIAL: half of the exponentials leave the special function unit; half precision only.
    """
    tiles = tl.cdiv(queries, BLOCK_M)
    pair = tl.program_id(0) // tiles
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    start = (tl.program_id(0) % tiles) * BLOCK_M
    m = start + tl.arange(0, BLOCK_M)
    if EIGHTHS:
        q_b, q_n, q_h = _eighths(q_b, q_n, q_h)
        k_b, k_n, k_h = _eighths(k_b, k_n, k_h)
        v_b, v_n, v_h = _eighths(v_b, v_n, v_h)
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    ADDED: tl.constexpr = (mask_ptr is not None) or (bias_ptr is not None)
    if mask_ptr is not None:
        mask_ptr += b * mask_b + h * mask_h
    if bias_ptr is not None:
        bias_ptr += h * bias_h
    q1 = _tile(q_ptr, m, queries, q_n, q_d, 0, D, D1, False)
    q2 = q1
    o1 = tl.zeros([BLOCK_M, D1], ACC)
    o2 = o1
    if D2 > 0:
        q2 = _tile(q_ptr, m, queries, q_n, q_d, D1, D, D2, False)
        o2 = tl.zeros([BLOCK_M, D2], ACC)
    factor = tl.maximum(tl.full([], scale, tl.float32) * LOG2E, SMALLEST)
    # The largest score so far, as it is; what the row's scores are multiplied by; the product.
    highest = tl.full([BLOCK_M], float("-inf"), ACC)
    row_factor = tl.zeros([BLOCK_M], ACC)
    shift = highest
    total = tl.zeros([BLOCK_M], ACC)
    last, seen = keys, keys
    if CAUSAL:
        last, seen = tl.minimum(keys, start + BLOCK_M), tl.minimum(keys, start)
    whole = seen // BLOCK_N * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    # First the tiles of keys that all these queries see, then those where some are hidden.
    for PART in tl.static_range(2):
        for first in tl.range(
            whole * PART, whole if PART == 0 else last, BLOCK_N, num_stages=None if PART == 0 else 1
        ):
            k_at, left = _row_at(k_ptr, first, k_n), keys - first
            k1 = _tile(k_at, n, left, k_n, k_d, 0, D, D1, PART == 0)
            k2 = k1
            if D2 > 0:
                k2 = _tile(k_at, n, left, k_n, k_d, D1, D, D2, PART == 0)
            s = _product(q1, q2, k1, k2, ACC, D2, PRECISION)
            if ADDED:
                s = _with_terms(
                    s, m, first + n, queries, keys, mask_ptr, bias_ptr, mask_q, mask_k, bias_q,
                    bias_k, scale, KEEP, False,
                )  # fmt: skip
            if PART == 1:
                s = _hide(s, m, first + n, keys, CAUSAL, False)
            higher = tl.maximum(highest, tl.max(s, 1))
            by, near = row_factor, higher
            if not ADDED:
                by = _factor(higher * factor, factor)
                near = higher * by
            moves = True
            if LAZY:
                # -inf - -inf is NaN, and no reason to rescale.
                moves = tl.max((near - shift > LAZY_BY).to(tl.int32), 0) != 0
            if moves:
                rescale = tl.exp2(_distance(shift, near, ADDED))
                total *= rescale
                o1 *= rescale[:, None]
                if D2 > 0:
                    o2 *= rescale[:, None]
                highest, row_factor, shift = higher, by, near
            if not ADDED:
                s *= row_factor[:, None]
            s = _distance(s, shift[:, None], ADDED)
            p = _shared_exp2(s, BLOCK_M, BLOCK_N) if POLYNOMIAL else tl.exp2(s)
            total += tl.sum(p, 1)
            v_at = _row_at(v_ptr, first, v_n)
            v1 = _tile(v_at, n, left, v_n, v_d, 0, D, D1, PART == 0)
            p = p.to(v1.dtype)
            o1 = add_dot(o1, p, v1, PRECISION)
            if D2 > 0:
                v2 = _tile(v_at, n, left, v_n, v_d, D1, D, D2, PART == 0)
                o2 = add_dot(o2, p, v2, PRECISION)
    inverse = 1.0 / tl.where(total > 0, total, 1.0)
    out_ptr += (b * queries * heads + h) * D
    _put(out_ptr, o1 * inverse[:, None], m, queries, heads * D, 0, D, D1)
    if D2 > 0:
        _put(out_ptr, o2 * inverse[:, None], m, queries, heads * D, D1, D, D2)
    if stats_ptr is not None:
        at = (b * heads + h) * queries + m
        tl.store(stats_ptr + at, shift, mask=m < queries)
        at += tl.full([], batch, tl.int64) * heads * queries
        tl.store(stats_ptr + at, total, mask=m < queries)
