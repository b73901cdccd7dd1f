"""Flash attention's backward in Triton: see triton_kernels.py, whose parts it shares."""

from __future__ import annotations

import triton
import triton.language as tl

from vitfast.ops.attention.triton_kernels import _logits, _product, _put, _tile, _weights
from vitfast.runtime.triton import COUNTS


@triton.jit(do_not_specialize=COUNTS)
def delta_kernel(
    out_ptr,  # [B, Nq, H, D], contiguous
    grad_ptr,  # [B, Nq, H, D], strides (grad_b, grad_n, grad_h, grad_d)
    delta_ptr,  # [B, H, Nq], contiguous; written
    heads, queries, grad_b, grad_n, grad_h, grad_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta [B, H, Nq] = sum over D of out * grad: what softmax's gradient takes off each row."""
    tiles = tl.cdiv(queries, BLOCK_M)
    pair = tl.program_id(0) // tiles
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    out_ptr += (b * queries * heads + h) * D
    grad_ptr += b * grad_b + h * grad_h
    out = _tile(out_ptr, m, queries, heads * D, 1, 0, D, BLOCK_D).to(ACC)
    grad = _tile(grad_ptr, m, queries, grad_n, grad_d, 0, D, BLOCK_D).to(ACC)
    at = (b * heads + h) * queries + m
    tl.store(delta_ptr + at, tl.sum(out * grad, 1), mask=m < queries)


@triton.jit
def _row_state(
    stats_ptr,  # [2, B, H, Nq], contiguous
    delta_ptr,  # [B, H, Nq], contiguous
    pair, batch, heads, m, queries,
):  # fmt: skip
    """Shift, 1 / sum and delta of some queries.

    1 / sum is 0 for a row that sees nothing. It is NaN, and so is all that follows, where the
    forward ran on a GPU backend that leaves no statistics.
    """
    at = pair.to(tl.int64) * queries + m
    pairs = tl.full([], batch, tl.int64) * heads
    live = m < queries
    shift = tl.load(stats_ptr + at, mask=live, other=0.0)
    total = tl.load(stats_ptr + pairs * queries + at, mask=live, other=1.0)
    inverse = tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))
    return shift, inverse, tl.load(delta_ptr + at, mask=live, other=0.0)


@triton.jit(do_not_specialize=COUNTS)
def keys_kernel(
    q_ptr,  # [B, Nq, H, D], strides (q_b, q_n, q_h, q_d)
    k_ptr,  # [B, Nk, H, D], strides (k_b, k_n, k_h, k_d)
    v_ptr,  # [B, Nk, H, D], strides (v_b, v_n, v_h, v_d)
    mask_ptr,  # [B, H, Nq, Nk], strides (mask_b, mask_h, mask_q, mask_k), or None; uint8 if KEEP
    bias_ptr,  # [H, Nq, Nk], strides (bias_h, bias_q, bias_k), or None
    grad_ptr,  # [B, Nq, H, D], strides (grad_b, grad_n, grad_h, grad_d)
    stats_ptr,  # [2, B, H, Nq], contiguous: each row's shift, and the sum of its weights
    delta_ptr,  # [B, H, Nq], contiguous, of delta_kernel
    dk_ptr,  # [B, Nk, H, D], strides (dk_b, dk_n, dk_h, 1); written
    dv_ptr,  # [B, Nk, H, D], strides (dv_b, dv_n, dv_h, 1); written
    batch, heads, queries, keys, scale,
    q_b, q_n, q_h, q_d, k_b, k_n, k_h, k_d, v_b, v_n, v_h, v_d, grad_b, grad_n, grad_h, grad_d,
    dk_b, dk_n, dk_h, dv_b, dv_n, dv_h, mask_b, mask_h, mask_q, mask_k, bias_h, bias_q, bias_k,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ACC: tl.constexpr, KEEP: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, over all queries."""
    tiles = tl.cdiv(keys, BLOCK_N)
    pair = tl.program_id(0) // tiles
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    start = (tl.program_id(0) % tiles) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    q_ptr += b * q_b + h * q_h
    grad_ptr += b * grad_b + h * grad_h
    ADDED: tl.constexpr = (mask_ptr is not None) or (bias_ptr is not None)
    if mask_ptr is not None:
        mask_ptr += b * mask_b + h * mask_h
    if bias_ptr is not None:
        bias_ptr += h * bias_h
    k1 = _tile(k_ptr + b * k_b + h * k_h, n, keys, k_n, k_d, 0, D, D1)
    v1 = _tile(v_ptr + b * v_b + h * v_h, n, keys, v_n, v_d, 0, D, D1)
    k2, v2 = k1, v1
    dk1 = tl.zeros([BLOCK_N, D1], ACC)
    dv1 = tl.zeros([BLOCK_N, D1], ACC)
    dk2, dv2 = dk1, dv1
    if D2 > 0:
        k2 = _tile(k_ptr + b * k_b + h * k_h, n, keys, k_n, k_d, D1, D, D2)
        v2 = _tile(v_ptr + b * v_b + h * v_h, n, keys, v_n, v_d, D1, D, D2)
        dk2 = tl.zeros([BLOCK_N, D2], ACC)
        dv2 = tl.zeros([BLOCK_N, D2], ACC)
    begin = 0
    if CAUSAL:
        begin = start // BLOCK_M * BLOCK_M
    for first in range(begin, queries, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        q1 = _tile(q_ptr, m, queries, q_n, q_d, 0, D, D1)
        g1 = _tile(grad_ptr, m, queries, grad_n, grad_d, 0, D, D1)
        q2, g2 = q1, g1
        if D2 > 0:
            q2 = _tile(q_ptr, m, queries, q_n, q_d, D1, D, D2)
            g2 = _tile(grad_ptr, m, queries, grad_n, grad_d, D1, D, D2)
        shift, inverse, delta = _row_state(stats_ptr, delta_ptr, pair, batch, heads, m, queries)
        s = _product(k1, k2, q1, q2, ACC, D2, PRECISION)
        s = _logits(
            s, m, n, queries, keys, mask_ptr, bias_ptr, mask_q, mask_k, bias_q, bias_k, scale, KEEP,
            CAUSAL, True,
        )  # fmt: skip
        p = _weights(s, shift[None, :], ADDED) * inverse[None, :]
        low = p.to(g1.dtype)
        dv1 = tl.dot(low, g1, acc=dv1, out_dtype=ACC, input_precision=PRECISION)
        dp = _product(v1, v2, g1, g2, ACC, D2, PRECISION)
        ds = (p * (dp - delta[None, :])).to(q1.dtype)
        dk1 = tl.dot(ds, q1, acc=dk1, out_dtype=ACC, input_precision=PRECISION)
        if D2 > 0:
            dv2 = tl.dot(low, g2, acc=dv2, out_dtype=ACC, input_precision=PRECISION)
            dk2 = tl.dot(ds, q2, acc=dk2, out_dtype=ACC, input_precision=PRECISION)
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
    delta_ptr,  # [B, H, Nq], contiguous, of delta_kernel
    dq_ptr,  # [B, Nq, H, D], strides (dq_b, dq_n, dq_h, 1); written
    batch, heads, queries, keys, scale,
    q_b, q_n, q_h, q_d, k_b, k_n, k_h, k_d, v_b, v_n, v_h, v_d, grad_b, grad_n, grad_h, grad_d,
    dq_b, dq_n, dq_h, mask_b, mask_h, mask_q, mask_k, bias_h, bias_q, bias_k,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ACC: tl.constexpr, KEEP: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries, over all keys."""
    tiles = tl.cdiv(queries, BLOCK_M)
    pair = tl.program_id(0) // tiles
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    start = (tl.program_id(0) % tiles) * BLOCK_M
    m = start + tl.arange(0, BLOCK_M)
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    grad_ptr += b * grad_b + h * grad_h
    ADDED: tl.constexpr = (mask_ptr is not None) or (bias_ptr is not None)
    if mask_ptr is not None:
        mask_ptr += b * mask_b + h * mask_h
    if bias_ptr is not None:
        bias_ptr += h * bias_h
    q1 = _tile(q_ptr, m, queries, q_n, q_d, 0, D, D1)
    g1 = _tile(grad_ptr, m, queries, grad_n, grad_d, 0, D, D1)
    q2, g2 = q1, g1
    dq1 = tl.zeros([BLOCK_M, D1], ACC)
    dq2 = dq1
    if D2 > 0:
        q2 = _tile(q_ptr, m, queries, q_n, q_d, D1, D, D2)
        g2 = _tile(grad_ptr, m, queries, grad_n, grad_d, D1, D, D2)
        dq2 = tl.zeros([BLOCK_M, D2], ACC)
    shift, inverse, delta = _row_state(stats_ptr, delta_ptr, pair, batch, heads, m, queries)
    last = keys
    if CAUSAL:
        last = tl.minimum(keys, start + BLOCK_M)
    for first in range(0, last, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        k1 = _tile(k_ptr, n, keys, k_n, k_d, 0, D, D1)
        v1 = _tile(v_ptr, n, keys, v_n, v_d, 0, D, D1)
        k2, v2 = k1, v1
        if D2 > 0:
            k2 = _tile(k_ptr, n, keys, k_n, k_d, D1, D, D2)
            v2 = _tile(v_ptr, n, keys, v_n, v_d, D1, D, D2)
        s = _product(q1, q2, k1, k2, ACC, D2, PRECISION)
        s = _logits(
            s, m, n, queries, keys, mask_ptr, bias_ptr, mask_q, mask_k, bias_q, bias_k, scale, KEEP,
            CAUSAL, False,
        )  # fmt: skip
        p = _weights(s, shift[:, None], ADDED) * inverse[:, None]
        dp = _product(g1, g2, v1, v2, ACC, D2, PRECISION)
        ds = (p * (dp - delta[:, None])).to(k1.dtype)
        dq1 = tl.dot(ds, k1, acc=dq1, out_dtype=ACC, input_precision=PRECISION)
        if D2 > 0:
            dq2 = tl.dot(ds, k2, acc=dq2, out_dtype=ACC, input_precision=PRECISION)
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
    delta_ptr,  # [B, H, Nq], contiguous, of delta_kernel
    dbias_ptr,  # [H, Nq, Nk], contiguous; written
    batch, heads, queries, keys, scale,
    q_b, q_n, q_h, q_d, k_b, k_n, k_h, k_d, v_b, v_n, v_h, v_d, grad_b, grad_n, grad_h, grad_d,
    mask_b, mask_h, mask_q, mask_k, bias_h, bias_q, bias_k,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ACC: tl.constexpr, KEEP: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The bias's gradient on one tile of one head: summed over the batch, in order."""
    across = tl.cdiv(keys, BLOCK_N)
    tiles = tl.cdiv(queries, BLOCK_M) * across
    h = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    m = (tile // across) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile % across) * BLOCK_N + tl.arange(0, BLOCK_N)
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
        q1 = _tile(q, m, queries, q_n, q_d, 0, D, D1)
        k1 = _tile(k, n, keys, k_n, k_d, 0, D, D1)
        v1 = _tile(v, n, keys, v_n, v_d, 0, D, D1)
        g1 = _tile(g, m, queries, grad_n, grad_d, 0, D, D1)
        q2, k2, v2, g2 = q1, k1, v1, g1
        if D2 > 0:
            q2 = _tile(q, m, queries, q_n, q_d, D1, D, D2)
            k2 = _tile(k, n, keys, k_n, k_d, D1, D, D2)
            v2 = _tile(v, n, keys, v_n, v_d, D1, D, D2)
            g2 = _tile(g, m, queries, grad_n, grad_d, D1, D, D2)
        pair = at * heads + h
        shift, inverse, delta = _row_state(stats_ptr, delta_ptr, pair, batch, heads, m, queries)
        s = _product(q1, q2, k1, k2, ACC, D2, PRECISION)
        s = _logits(
            s, m, n, queries, keys, seen, bias_ptr, mask_q, mask_k, bias_q, bias_k, scale, KEEP,
            CAUSAL, False,
        )  # fmt: skip
        p = _weights(s, shift[:, None], True) * inverse[:, None]
        dp = _product(g1, g2, v1, v2, ACC, D2, PRECISION)
        total += p * (dp - delta[:, None])
    at = (wide * queries + m.to(tl.int64))[:, None] * keys + n[None, :]
    tl.store(dbias_ptr + at, total, mask=(m < queries)[:, None] & (n < keys)[None, :])
