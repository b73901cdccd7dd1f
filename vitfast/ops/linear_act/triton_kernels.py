"""The Triton kernels of linear_act: a product with its epilogue, and the gradient before it.

Floor: 2 M N K flops; bytes are x, W and y once, and z once where training keeps it. What the
epilogue saves is a pass over 2 M N elements (gated 3 M N). The backward's pass from grad and z to
dz reads two tensors and writes one; its products are the vendor's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitfast.ops.common.triton_dots import add_dot
from vitfast.runtime.triton import COUNTS


@triton.jit
def _sigmoid(x):
    """Without an overflow: exp of what is not positive only."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _bell(x):
    """The derivative of the sigmoid, without the cancellation of 1 - s."""
    e = tl.exp(-tl.abs(x))
    return e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _activate(x, ACT: tl.constexpr):
    if ACT == 1:
        x = tl.where(x > 0, x, x * 0.0)  # NaN stays NaN
    elif ACT == 2:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == 3:
        x = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == 4:
        x = x * _sigmoid(1.702 * x)
    elif ACT == 5:
        x = x * _sigmoid(x)
    elif ACT == 6:
        x = _sigmoid(x)
    return x


@triton.jit
def _slope(x, ACT: tl.constexpr):
    """The activation's derivative."""
    if ACT == 1:
        d = tl.where(x > 0, 1.0, x * 0.0)
    elif ACT == 2:
        bell = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        d = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * bell
    elif ACT == 3:
        u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        d = _sigmoid(u) + tl.where(tl.abs(x) > 1e4, 0.0, x * _bell(u) * inner)
    elif ACT == 4:
        d = _sigmoid(1.702 * x) + 1.702 * x * _bell(1.702 * x)
    elif ACT == 5:
        d = _sigmoid(x) + x * _bell(x)
    elif ACT == 6:
        d = _bell(x)
    else:
        d = x * 0.0 + 1.0
    return d


@triton.jit
def _weights(
    w_ptr,  # [N, K], strides (stride_n, stride_k)
    n, k, cols, depth, stride_n, stride_k, DTYPE: tl.constexpr,
):  # fmt: skip
    """A [k, n] tile of W^T; float32 weights are rounded as autocast rounds them."""
    at = n.to(tl.int64)[None, :] * stride_n + k.to(tl.int64)[:, None] * stride_k
    return tl.load(w_ptr + at, mask=(k < depth)[:, None] & (n < cols)[None, :], other=0.0).to(DTYPE)


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    x_ptr,  # [M, K], strides (x_m, x_k)
    w_ptr,  # [N, K], strides (w_n, w_k)
    bias_ptr,  # [N], contiguous, or None
    gate_w_ptr,  # [N, K], strides (gate_n, gate_k), or None
    gate_bias_ptr,  # [N], contiguous, or None
    y_ptr,  # [M, N], contiguous; written
    z_ptr,  # [M, N or 2N], strides (z_m, 1), or None; written
    rows, cols, depth,
    x_m, x_k, w_n, w_k, gate_n, gate_k, z_m, z_value, z_gate,
    ACT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = act(x W^T + b), or act(x Wg^T + bg) * (x W^T + b) with a gate.

    z_value and z_gate are the columns of z at which the value's and the gate's sums begin.
    """
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(cols, BLOCK_N)
    pid = tl.program_id(0)
    # Neighbouring programs share tiles of both operands in the L2 cache.
    group = pid // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    m = (group * GROUP + pid % (GROUP * across) % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (pid % (GROUP * across) // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = m.to(tl.int64)[:, None] * x_m
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    gate = total
    for first in range(0, depth, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        mask = (m < rows)[:, None] & (k < depth)[None, :]
        x = tl.load(x_ptr + start + k.to(tl.int64)[None, :] * x_k, mask=mask, other=0.0)
        w = _weights(w_ptr, n, k, cols, depth, w_n, w_k, x.dtype)
        total = add_dot(total, x, w, PRECISION)
        if gate_w_ptr is not None:
            w = _weights(gate_w_ptr, n, k, cols, depth, gate_n, gate_k, x.dtype)
            gate = add_dot(gate, x, w, PRECISION)
    inside = n < cols
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=inside, other=0.0).to(y_ptr.dtype.element_ty).to(ACC)
    out = m.to(tl.int64)[:, None] * cols + n[None, :]
    mask = (m < rows)[:, None] & inside[None, :]
    if z_ptr is not None:
        at = m.to(tl.int64)[:, None] * z_m + n[None, :]
        tl.store(z_ptr + at + z_value, total.to(z_ptr.dtype.element_ty), mask=mask)
    if gate_w_ptr is not None:
        if gate_bias_ptr is not None:
            b = tl.load(gate_bias_ptr + n, mask=inside, other=0.0).to(y_ptr.dtype.element_ty)
            gate += b.to(ACC)
        if z_ptr is not None:
            tl.store(z_ptr + at + z_gate, gate.to(z_ptr.dtype.element_ty), mask=mask)
        y = _activate(gate, ACT) * total
    else:
        y = _activate(total, ACT)
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    grad_ptr,  # [M, N], strides (grad_m, 1)
    z_ptr,  # [M, N or 2N], strides (z_m, 1)
    dz_ptr,  # as z_ptr; written
    sums_ptr,  # [row blocks, N], contiguous; written
    gate_sums_ptr,  # [row blocks, N], contiguous, or None without a gate; written
    rows, cols, grad_m, z_m, z_value, z_gate,
    ACT: tl.constexpr, ACC: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dz from grad and z, and each row block's sums for the biases' gradients."""
    across = tl.cdiv(cols, BLOCK_N)
    n = (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(0) // across
    blocks = tl.num_programs(0) // across
    inside = n < cols
    sums = tl.zeros([BLOCK_N], ACC)
    gate_sums = tl.zeros([BLOCK_N], ACC)
    for first in range(block, tl.cdiv(rows, BLOCK_M), blocks):
        m = tl.arange(0, BLOCK_M).to(tl.int64) + first * BLOCK_M
        mask = (m < rows)[:, None] & inside[None, :]
        at = m[:, None] * z_m + n[None, :]
        d = tl.load(grad_ptr + m[:, None] * grad_m + n[None, :], mask=mask, other=0.0).to(ACC)
        z = tl.load(z_ptr + at + z_value, mask=mask, other=0.0).to(ACC)
        if GATED:
            g = tl.load(z_ptr + at + z_gate, mask=mask, other=0.0).to(ACC)
            dg = d * z * _slope(g, ACT)
            d = d * _activate(g, ACT)
            tl.store(dz_ptr + at + z_gate, dg.to(dz_ptr.dtype.element_ty), mask=mask)
            gate_sums += tl.sum(tl.where(mask, dg, 0.0), axis=0)
        else:
            d = d * _slope(z, ACT)
        tl.store(dz_ptr + at + z_value, d.to(dz_ptr.dtype.element_ty), mask=mask)
        sums += tl.sum(tl.where(mask, d, 0.0), axis=0)
    at = block.to(tl.int64) * cols + n
    tl.store(sums_ptr + at, sums, mask=inside)
    if GATED:
        tl.store(gate_sums_ptr + at, gate_sums, mask=inside)
