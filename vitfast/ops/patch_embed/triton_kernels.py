"""The Triton kernel of patch_embed: patches are gathered, scaled and multiplied in one pass.

Floor: 2 B N C K flops (K = Cin P P'); bytes are image, weight and tokens once. The image is read
where it lies, in any layout and as bytes too: no patch matrix and no normalised image in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitfast.ops.common.triton_dots import add_dot
from vitfast.runtime.triton import COUNTS


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    image_ptr,  # [B, Cin, H, W], strides (image_b, image_c, image_h, image_w); uint8 if BYTES
    w_ptr,  # [C, Cin P P'], strides (w_n, 1)
    bias_ptr,  # [C], contiguous, or None
    pos_ptr,  # [B, N, C], strides (pos_b, pos_t, 1), or None
    mean_ptr,  # [Cin], contiguous, or None
    std_ptr,  # [Cin], contiguous, or None
    out_ptr,  # [B, N, C], strides (out_b, out_t, 1); written
    rows, cols, per_image, columns,
    image_b, image_c, image_h, image_w, w_n, out_b, out_t, pos_b, pos_t,
    DEPTH: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, ACC: tl.constexpr,
    DTYPE: tl.constexpr, BYTES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[b, t] = W patch(b, t) + bias + pos; a program's patches are neighbours."""
    across = tl.cdiv(cols, BLOCK_N)
    m = (tl.program_id(0) // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    b, token = m // per_image, m % per_image
    corner = b * image_b + (token // columns) * P * image_h + (token % columns) * Q * image_w
    live, inside = m < rows, n < cols
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for first in range(0, DEPTH, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        real = k < DEPTH
        channel = k // (P * Q)
        at = channel.to(tl.int64) * image_c + ((k // Q) % P).to(tl.int64) * image_h
        at += (k % Q).to(tl.int64) * image_w
        mask = live[:, None] & real[None, :]
        x = tl.load(image_ptr + corner[:, None] + at[None, :], mask=mask, other=0)
        if BYTES or (mean_ptr is not None) or (std_ptr is not None):
            x = x.to(ACC)
            if BYTES:
                x = x / 255.0
            if mean_ptr is not None:
                x -= tl.load(mean_ptr + channel, mask=real, other=0.0).to(ACC)[None, :]
            if std_ptr is not None:
                x /= tl.load(std_ptr + channel, mask=real, other=1.0).to(ACC)[None, :]
        w = n.to(tl.int64)[None, :] * w_n + k[:, None]
        w = tl.load(w_ptr + w, mask=real[:, None] & inside[None, :], other=0.0).to(DTYPE)
        total = add_dot(total, x.to(DTYPE), w, PRECISION)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=inside, other=0.0).to(DTYPE).to(ACC)[None, :]
    mask = live[:, None] & inside[None, :]
    if pos_ptr is not None:
        at = (b * pos_b + token * pos_t)[:, None] + n[None, :]
        total += tl.load(pos_ptr + at, mask=mask, other=0.0).to(ACC)
    at = (b * out_b + token * out_t)[:, None] + n[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)
