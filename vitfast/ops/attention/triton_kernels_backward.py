"""Flash attention's backward in Triton: see triton_kernels.py, whose parts it shares."""

from __future__ import annotations

import triton
import triton.language as tl

from vitfast.ops.attention.triton_kernels import (
    LOG2E,
    _distance,
    _eighths,
    _factor,
    _hide,
    _product,
    _put,
    _row_at,
    _tile,
    _with_terms,
)
from vitfast.ops.common.triton_dots import add_dot
from vitfast.runtime.triton import COUNTS


@triton.jit(do_not_specialize=COUNTS)
def rows_kernel(
    out_ptr,  # [B, Nq, H, D], contiguous
    grad_ptr,  # [B, Nq, H, D], strides (grad_b, grad_n, grad_h, grad_d)
    stats_ptr,  # [2, B, H, Nq], contiguous: each row's shift, and the sum of its weights
    rows_ptr,  # [2, B, H, Nq], contiguous; written: 1 / sum, and delta
    batch, heads, queries, grad_b, grad_n, grad_h, grad_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """What the passes over tiles need of each row, made once.

    delta is the sum over D of out * grad, which softmax's gradient takes off each row. 1 / sum is 0
    for a row that sees nothing. It is NaN, and so is all that follows, where the forward ran on a
    GPU backend that leaves no statistics.
    """
    tiles = tl.cdiv(queries, BLOCK_M)
    pair = tl.program_id(0) // tiles
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = m < queries
    out_ptr += (b * queries * heads + h) * D
    grad_ptr += b * grad_b + h * grad_h
    out = _tile(out_ptr, m, queries, heads * D, 1, 0, D, BLOCK_D, False).to(ACC)
    grad = _tile(grad_ptr, m, queries, grad_n, grad_d, 0, D, BLOCK_D, False).to(ACC)
    at = (b * heads + h) * queries + m
    half = tl.full([], batch, tl.int64) * heads * queries
    total = tl.load(stats_ptr + half + at, mask=live, other=1.0)
    inverse = tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))
    tl.store(rows_ptr + at, inverse, mask=live)
    tl.store(rows_ptr + half + at, tl.sum(out * grad, 1), mask=live)


@triton.jit
def _row_state(
    stats_ptr,  # [2, B, H, Nq], contiguous: each row's shift, and the sum of its weights
    rows_ptr,  # [2, B, H, Nq], contiguous, of rows_kernel
    pair, batch, heads, m, queries, WHOLE: tl.constexpr,
):  # fmt: skip
    """Shift, 1 / sum and delta of queries m; zeros for those that are not there.

    WHOLE: all are.
    """
    at = pair.to(tl.int64) * queries + m
    half = tl.full([], batch, tl.int64) * heads * queries
    if WHOLE:
        return tl.load(stats_ptr + at), tl.load(rows_ptr + at), tl.load(rows_ptr + half + at)
    live = m < queries
    shift = tl.load(stats_ptr + at, mask=live, other=0.0)
    inverse = tl.load(rows_ptr + at, mask=live, other=0.0)
    return shift, inverse, tl.load(rows_ptr + half + at, mask=live, other=0.0)


@triton.jit
def _weights(
    s, shift, inverse, m, n, queries, keys,
    mask_ptr,  # [Nq, Nk] of this batch entry and head, strides (mask_q, mask_k), or None
    bias_ptr,  # [Nq, Nk] of this head, strides (bias_q, bias_k), or None
    mask_q, mask_k, bias_q, bias_k, scale,
    KEEP: tl.constexpr, CAUSAL: tl.constexpr, TURNED: tl.constexpr, SHOWN: tl.constexpr,
):  # fmt: skip
    """Softmax's weights again, from products s and the rows' shifts and 1 / sums.

    TURNED: s is [keys, queries]. SHOWN: no key has to be hidden, since all are there and seen, or
    since what comes of them is not read.
    """
    if (mask_ptr is not None) or (bias_ptr is not None):
        s = _with_terms(
            s, m, n, queries, keys, mask_ptr, bias_ptr, mask_q, mask_k, bias_q, bias_k, scale, KEEP,
            TURNED,
        )  # fmt: skip
        x = _distance(s, shift, True)
    else:
        x = _distance(s * _factor(shift, tl.full([], scale, tl.float32) * LOG2E), shift, False)
    if not SHOWN:
        x = _hide(x, m, n, keys, CAUSAL, TURNED)
    return tl.exp2(x) * inverse


@triton.jit(do_not_specialize=COUNTS)
def keys_kernel(
    q_ptr,  # [B, Nq, H, D], strides (q_b, q_n, q_h, q_d)
    k_ptr,  # [B, Nk, H, D], strides (k_b, k_n, k_h, k_d)
    v_ptr,  # [B, Nk, H, D], strides (v_b, v_n, v_h, v_d)
    mask_ptr,  # [B, H, Nq, Nk], strides (mask_b, mask_h, mask_q, mask_k), or None; uint8 if KEEP
    bias_ptr,  # [H, Nq, Nk], strides (bias_h, bias_q, bias_k), or None
    grad_ptr,  # [B, Nq, H, D], strides (grad_b, grad_n, grad_h, grad_d)
    stats_ptr,  # [2, B, H, Nq], contiguous: each row's shift, and the sum of its weights
    rows_ptr,  # [2, B, H, Nq], contiguous, of rows_kernel
    dk_ptr,  # [B, Nk, H, D], strides (dk_b, dk_n, dk_h, 1); written
    dv_ptr,  # [B, Nk, H, D], strides (dv_b, dv_n, dv_h, 1); written
    batch, heads, queries, keys, scale,
    q_b, q_n, q_h, q_d, k_b, k_n, k_h, k_d, v_b, v_n, v_h, v_d, grad_b, grad_n, grad_h, grad_d,
    dk_b, dk_n, dk_h, dv_b, dv_n, dv_h, mask_b, mask_h, mask_q, mask_k, bias_h, bias_q, bias_k,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ACC: tl.constexpr, KEEP: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EIGHTHS: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, over all queries."""
    tiles = tl.cdiv(keys, BLOCK_N)
    pair = tl.program_id(0) // tiles
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    start = (tl.program_id(0) % tiles) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    if EIGHTHS:
        q_b, q_n, q_h = _eighths(q_b, q_n, q_h)
        k_b, k_n, k_h = _eighths(k_b, k_n, k_h)
        v_b, v_n, v_h = _eighths(v_b, v_n, v_h)
        grad_b, grad_n, grad_h = _eighths(grad_b, grad_n, grad_h)
        dk_b, dk_n, dk_h = _eighths(dk_b, dk_n, dk_h)
        dv_b, dv_n, dv_h = _eighths(dv_b, dv_n, dv_h)
    q_ptr += b * q_b + h * q_h
    grad_ptr += b * grad_b + h * grad_h
    if mask_ptr is not None:
        mask_ptr += b * mask_b + h * mask_h
    if bias_ptr is not None:
        bias_ptr += h * bias_h
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    k1 = _tile(k_ptr, n, keys, k_n, k_d, 0, D, D1, False)
    v1 = _tile(v_ptr, n, keys, v_n, v_d, 0, D, D1, False)
    k2, v2 = k1, v1
    dk1 = tl.zeros([BLOCK_N, D1], ACC)
    dv1 = tl.zeros([BLOCK_N, D1], ACC)
    dk2, dv2 = dk1, dv1
    if D2 > 0:
        k2 = _tile(k_ptr, n, keys, k_n, k_d, D1, D, D2, False)
        v2 = _tile(v_ptr, n, keys, v_n, v_d, D1, D, D2, False)
        dk2 = tl.zeros([BLOCK_N, D2], ACC)
        dv2 = tl.zeros([BLOCK_N, D2], ACC)
    begin = 0
    if CAUSAL:
        begin = start // BLOCK_M * BLOCK_M
    whole = queries // BLOCK_M * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    # Keys that are not there have rows of their own, which are not written.
    for PART in tl.static_range(2):  # whole tiles, then the rest
        for first in tl.range(
            begin if PART == 0 else tl.maximum(begin, whole), whole if PART == 0 else queries,
            BLOCK_M, num_stages=None if PART == 0 else 1,
        ):  # fmt: skip
            q_at, left = _row_at(q_ptr, first, q_n), queries - first
            g_at = _row_at(grad_ptr, first, grad_n)
            q1 = _tile(q_at, m, left, q_n, q_d, 0, D, D1, PART == 0)
            g1 = _tile(g_at, m, left, grad_n, grad_d, 0, D, D1, PART == 0)
            q2, g2 = q1, g1
            if D2 > 0:
                q2 = _tile(q_at, m, left, q_n, q_d, D1, D, D2, PART == 0)
                g2 = _tile(g_at, m, left, grad_n, grad_d, D1, D, D2, PART == 0)
            shift, inverse, delta = _row_state(
                stats_ptr, rows_ptr, pair, batch, heads, first + m, queries, PART == 0
            )
            s = _product(k1, k2, q1, q2, ACC, D2, PRECISION)
            p = _weights(
                s, shift[None, :], inverse[None, :], first + m, n, queries, keys, mask_ptr,
                bias_ptr, mask_q, mask_k, bias_q, bias_k, scale, KEEP, CAUSAL, True, not CAUSAL,
            )  # fmt: skip
            low = p.to(g1.dtype)
            dv1 = add_dot(dv1, low, g1, PRECISION)
            dp = _product(v1, v2, g1, g2, ACC, D2, PRECISION)
            ds = (p * (dp - delta[None, :])).to(q1.dtype)
            dk1 = add_dot(dk1, ds, q1, PRECISION)
            if D2 > 0:
                dv2 = add_dot(dv2, low, g2, PRECISION)
                dk2 = add_dot(dk2, ds, q2, PRECISION)
    dk_ptr += b * dk_b + h * dk_h
    dv_ptr += b * dv_b + h * dv_h
    _put(dk_ptr, dk1 * scale, n, keys, dk_n, 0, D, D1)
    _put(dv_ptr, dv1, n, keys, dv_n, 0, D, D1)
    if D2 > 0:
        _put(dk_ptr, dk2 * scale, n, keys, dk_n, D1, D, D2)
        _put(dv_ptr, dv2, n, keys, dv_n, D1, D, D2)


@triton.jit(do_not_specialize=COUNTS)
def queries_kernel(
    q_ptr,  # [B, Nq, H, D], strides (q_b, q_n, q_h, q_d)
    k_ptr,  # [B, Nk, H, D], strides (k_b, k_n, k_h, k_d)
    v_ptr,  # [B, Nk, H, D], strides (v_b, v_n, v_h, v_d)
    mask_ptr,  # [B, H, Nq, Nk], strides (mask_b, mask_h, mask_q, mask_k), or None; uint8 if KEEP
    bias_ptr,  # [H, Nq, Nk], strides (bias_h, bias_q, bias_k), or None
    grad_ptr,  # [B, Nq, H, D], strides (grad_b, grad_n, grad_h, grad_d)
    stats_ptr,  # [2, B, H, Nq], contiguous: each row's shift, and the sum of its weights
    rows_ptr,  # [2, B, H, Nq], contiguous, of rows_kernel
    dq_ptr,  # [B, Nq, H, D], strides (dq_b, dq_n, dq_h, 1); written
    batch, heads, queries, keys, scale,
    q_b, q_n, q_h, q_d, k_b, k_n, k_h, k_d, v_b, v_n, v_h, v_d, grad_b, grad_n, grad_h, grad_d,
    dq_b, dq_n, dq_h, mask_b, mask_h, mask_q, mask_k, bias_h, bias_q, bias_k,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ACC: tl.constexpr, KEEP: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EIGHTHS: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries, over all keys."""
    tiles = tl.cdiv(queries, BLOCK_M)
    pair = tl.program_id(0) // tiles
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    start = (tl.program_id(0) % tiles) * BLOCK_M
    m = start + tl.arange(0, BLOCK_M)
    if EIGHTHS:
        q_b, q_n, q_h = _eighths(q_b, q_n, q_h)
        k_b, k_n, k_h = _eighths(k_b, k_n, k_h)
        v_b, v_n, v_h = _eighths(v_b, v_n, v_h)
        grad_b, grad_n, grad_h = _eighths(grad_b, grad_n, grad_h)
        dq_b, dq_n, dq_h = _eighths(dq_b, dq_n, dq_h)
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    grad_ptr += b * grad_b + h * grad_h
    if mask_ptr is not None:
        mask_ptr += b * mask_b + h * mask_h
    if bias_ptr is not None:
        bias_ptr += h * bias_h
    q1 = _tile(q_ptr, m, queries, q_n, q_d, 0, D, D1, False)
    g1 = _tile(grad_ptr, m, queries, grad_n, grad_d, 0, D, D1, False)
    q2, g2 = q1, g1
    dq1 = tl.zeros([BLOCK_M, D1], ACC)
    dq2 = dq1
    if D2 > 0:
        q2 = _tile(q_ptr, m, queries, q_n, q_d, D1, D, D2, False)
        g2 = _tile(grad_ptr, m, queries, grad_n, grad_d, D1, D, D2, False)
        dq2 = tl.zeros([BLOCK_M, D2], ACC)
    shift, inverse, delta = _row_state(stats_ptr, rows_ptr, pair, batch, heads, m, queries, False)
    last, seen = keys, keys
    if CAUSAL:
        last, seen = tl.minimum(keys, start + BLOCK_M), tl.minimum(keys, start)
    whole = seen // BLOCK_N * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    for PART in tl.static_range(2):  # as in forward_kernel
        for first in tl.range(
            whole * PART, whole if PART == 0 else last, BLOCK_N, num_stages=None if PART == 0 else 1
        ):
            k_at, v_at, left = _row_at(k_ptr, first, k_n), _row_at(v_ptr, first, v_n), keys - first
            k1 = _tile(k_at, n, left, k_n, k_d, 0, D, D1, PART == 0)
            v1 = _tile(v_at, n, left, v_n, v_d, 0, D, D1, PART == 0)
            k2, v2 = k1, v1
            if D2 > 0:
                k2 = _tile(k_at, n, left, k_n, k_d, D1, D, D2, PART == 0)
                v2 = _tile(v_at, n, left, v_n, v_d, D1, D, D2, PART == 0)
            s = _product(q1, q2, k1, k2, ACC, D2, PRECISION)
            p = _weights(
                s, shift[:, None], inverse[:, None], m, first + n, queries, keys, mask_ptr,
                bias_ptr, mask_q, mask_k, bias_q, bias_k, scale, KEEP, CAUSAL, False, PART == 0,
            )  # fmt: skip
            dp = _product(g1, g2, v1, v2, ACC, D2, PRECISION)
            ds = (p * (dp - delta[:, None])).to(k1.dtype)
            dq1 = add_dot(dq1, ds, k1, PRECISION)
            if D2 > 0:
                dq2 = add_dot(dq2, ds, k2, PRECISION)
    dq_ptr += b * dq_b + h * dq_h
    _put(dq_ptr, dq1 * scale, m, queries, dq_n, 0, D, D1)
    if D2 > 0:
        _put(dq_ptr, dq2 * scale, m, queries, dq_n, D1, D, D2)


@triton.jit(do_not_specialize=COUNTS)
def bias_kernel(
    q_ptr,  # [B, Nq, H, D], strides (q_b, q_n, q_h, q_d)
    k_ptr,  # [B, Nk, H, D], strides (k_b, k_n, k_h, k_d)
    v_ptr,  # [B, Nk, H, D], strides (v_b, v_n, v_h, v_d)
    mask_ptr,  # [B, H, Nq, Nk], strides (mask_b, mask_h, mask_q, mask_k), or None; uint8 if KEEP
    bias_ptr,  # [H, Nq, Nk], strides (bias_h, bias_q, bias_k)
    grad_ptr,  # [B, Nq, H, D], strides (grad_b, grad_n, grad_h, grad_d)
    stats_ptr,  # [2, B, H, Nq], contiguous: each row's shift, and the sum of its weights
    rows_ptr,  # [2, B, H, Nq], contiguous, of rows_kernel
    dbias_ptr,  # [H, Nq, Nk], contiguous; written
    batch, heads, queries, keys, scale,
    q_b, q_n, q_h, q_d, k_b, k_n, k_h, k_d, v_b, v_n, v_h, v_d, grad_b, grad_n, grad_h, grad_d,
    mask_b, mask_h, mask_q, mask_k, bias_h, bias_q, bias_k,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ACC: tl.constexpr, KEEP: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EIGHTHS: tl.constexpr,
):  # fmt: skip
    """The bias's gradient on one tile of one head: summed over the batch, in order."""
    across = tl.cdiv(keys, BLOCK_N)
    tiles = tl.cdiv(queries, BLOCK_M) * across
    h = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    m = (tile // across) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    if EIGHTHS:
        q_b, q_n, q_h = _eighths(q_b, q_n, q_h)
        k_b, k_n, k_h = _eighths(k_b, k_n, k_h)
        v_b, v_n, v_h = _eighths(v_b, v_n, v_h)
        grad_b, grad_n, grad_h = _eighths(grad_b, grad_n, grad_h)
    wide = h.to(tl.int64)
    bias_ptr += wide * bias_h
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for b in range(0, batch):
        at = tl.full([], b, tl.int64)
        q = q_ptr + at * q_b + wide * q_h
        k = k_ptr + at * k_b + wide * k_h
        v = v_ptr + at * v_b + wide * v_h
        g = grad_ptr + at * grad_b + wide * grad_h
        seen = mask_ptr
        if mask_ptr is not None:
            seen = mask_ptr + at * mask_b + wide * mask_h
        q1 = _tile(q, m, queries, q_n, q_d, 0, D, D1, False)
        k1 = _tile(k, n, keys, k_n, k_d, 0, D, D1, False)
        v1 = _tile(v, n, keys, v_n, v_d, 0, D, D1, False)
        g1 = _tile(g, m, queries, grad_n, grad_d, 0, D, D1, False)
        q2, k2, v2, g2 = q1, k1, v1, g1
        if D2 > 0:
            q2 = _tile(q, m, queries, q_n, q_d, D1, D, D2, False)
            k2 = _tile(k, n, keys, k_n, k_d, D1, D, D2, False)
            v2 = _tile(v, n, keys, v_n, v_d, D1, D, D2, False)
            g2 = _tile(g, m, queries, grad_n, grad_d, D1, D, D2, False)
        pair = at * heads + h
        shift, inverse, delta = _row_state(
            stats_ptr, rows_ptr, pair, batch, heads, m, queries, False
        )
        s = _product(q1, q2, k1, k2, ACC, D2, PRECISION)
        p = _weights(
            s, shift[:, None], inverse[:, None], m, n, queries, keys, seen, bias_ptr, mask_q,
            mask_k, bias_q, bias_k, scale, KEEP, CAUSAL, False, not CAUSAL,
        )  # fmt: skip
        dp = _product(g1, g2, v1, v2, ACC, D2, PRECISION)
        total += p * (dp - delta[:, None])
    at = (wide * queries + m.to(tl.int64))[:, None] * keys + n[None, :]
    tl.store(dbias_ptr + at, total, mask=(m < queries)[:, None] & (n < keys)[None, :])
