"""Triton kernels of the norms, residual_add and patch_merge: one pass over memory each.

Floors, in units of one tensor read or written: a norm and patch_merge 2, norm_add 3 (read x and
branch, write the sum), the backward of each 3, add_norm 4 (read x and branch, write residual and
normed), its backward 5 with both gradients coming in (read grad_normed, grad_residual,
residual; write dx, dbranch) and 6 with LayerScale (read branch). About 10 flops an element: memory
decides. Whole rows stand in registers; sums over rows go to one partial row a program, added up
afterwards in a fixed order, so that gradients are the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitfast.runtime.triton import COUNTS


@triton.jit
def _offsets(row, n, outer, inner):
    """Where rows begin; 64 bits, since a tensor may hold more than 2^31 elements."""
    row = row.to(tl.int64)
    return (row // n) * outer + (row % n) * inner


@triton.jit
def _columns(c, BLOCK: tl.constexpr, MERGE: tl.constexpr):
    """The channel of each column of a tile, and whether it exists; with MERGE the tile's quarters
    are the pixels of a patch, each as wide as a power of two."""
    column = tl.arange(0, BLOCK)
    inside = column < c
    if MERGE:
        channel = column % (BLOCK // 4)
        inside = channel < c // 4
        column = (column // (BLOCK // 4)).to(tl.int64) * (c // 4) + channel
    return column, inside


@triton.jit
def _pixels(row, n, outer, inner, side, height, width, BLOCK: tl.constexpr):
    """Where the elements of 2x2 patches are in a map, and whether they are inside it."""
    row = row.to(tl.int64)
    across = (width + 1) // 2
    h, w = (row % n) // across * 2, (row % n) % across * 2
    quarter = (tl.arange(0, BLOCK) // (BLOCK // 4)).to(tl.int64)
    down, right = quarter % 2, quarter // 2
    at = ((row // n) * outer + h * inner + w * side)[:, None]
    at += (down * inner + right * side + tl.arange(0, BLOCK) % (BLOCK // 4))[None, :]
    exists = h[:, None] + down[None, :] < height
    return at, exists & (w[:, None] + right[None, :] < width)


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    x_ptr,  # [rows, C], strides (x_outer, x_inner, 1); MERGE: the map [B, H, W, C / 4]
    branch_ptr,  # None or [rows, C], strides (branch_outer, branch_inner, 1)
    gamma_ptr,  # None or [C]
    drop_ptr,  # None or [B]: factor of the branch
    weight_ptr,  # None or [C]
    bias_ptr,  # None or [C]
    base_ptr,  # None or [rows, C], strides (base_outer, base_inner, 1): added to the norm
    scale_ptr,  # None or [B]: factor of the norm
    residual_ptr,  # None or out [rows, C], contiguous
    normed_ptr,  # None with KIND 2, else out [rows, C], contiguous
    stats_ptr,  # None or out [rows, 2], ACC: mean (0 with RMS), 1 / sqrt(var + eps)
    rows,  # B * n
    n,  # rows of an entry of the first dimension
    c,  # C
    x_outer, x_inner,  # strides of the first dimension and of a row; MERGE: of image and line
    branch_outer, branch_inner,
    base_outer, base_inner,
    x_side,  # MERGE: stride of a pixel
    map_height, map_width,  # MERGE: H, W
    eps,
    KIND: tl.constexpr,  # 0 LayerNorm, 1 RMSNorm, 2 none
    BLOCK: tl.constexpr,  # power of two, at least C
    ACC: tl.constexpr,  # dtype of the arithmetic
    MERGE: tl.constexpr,  # whether rows are the 2x2 patches of a map
    ROWS: tl.constexpr,  # rows of a program
):  # fmt: skip
    """residual = x + drop * gamma * branch; normed = base + scale * (norm(residual) * w + b)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column, inside = _columns(c, BLOCK, MERGE)
    live = row < rows
    mask = live[:, None] & inside[None, :]
    out = row[:, None] * c + column[None, :]
    if MERGE:
        at, exists = _pixels(row, n, x_outer, x_inner, x_side, map_height, map_width, BLOCK)
        r = tl.load(x_ptr + at, mask=mask & exists, other=0.0).to(ACC)
    else:
        at = _offsets(row, n, x_outer, x_inner)[:, None] + column[None, :]
        r = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    if branch_ptr is not None:
        at = _offsets(row, n, branch_outer, branch_inner)[:, None] + column[None, :]
        b = tl.load(branch_ptr + at, mask=mask, other=0.0).to(ACC)
        if gamma_ptr is not None:
            b *= tl.load(gamma_ptr + column, mask=inside, other=0.0).to(ACC)[None, :]
        if drop_ptr is not None:
            b *= tl.load(drop_ptr + row // n, mask=live, other=0.0).to(ACC)[:, None]
        r += b
    if residual_ptr is not None:
        rounded = r.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + out, rounded, mask=mask)
        r = rounded.to(ACC)
    if KIND != 2:
        if KIND == 0:
            mean = tl.sum(r, axis=1) / c
            # What the mean's rounding left: the rows' sums then are as good as their elements.
            mean += tl.sum(tl.where(mask, r - mean[:, None], 0.0), axis=1) / c
            d = tl.where(mask, r - mean[:, None], 0.0)
        else:
            mean = tl.zeros([ROWS], ACC)
            d = r
        rstd = 1.0 / tl.sqrt(tl.sum(d * d, axis=1) / c + eps)
        y = d * rstd[:, None]
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(ACC)[None, :]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(ACC)[None, :]
        if scale_ptr is not None:
            y *= tl.load(scale_ptr + row // n, mask=live, other=0.0).to(ACC)[:, None]
        if base_ptr is not None:
            at = _offsets(row, n, base_outer, base_inner)[:, None] + column[None, :]
            y += tl.load(base_ptr + at, mask=mask, other=0.0).to(ACC)
        tl.store(normed_ptr + out, y.to(normed_ptr.dtype.element_ty), mask=mask)
        if stats_ptr is not None:
            tl.store(stats_ptr + row * 2, mean, mask=live)
            tl.store(stats_ptr + row * 2 + 1, rstd, mask=live)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    grad_ptr,  # [rows, C], strides (grad_outer, grad_inner, 1): of normed; None with KIND 2
    grad_residual_ptr,  # None or [rows, C], strides (grad_residual_outer, .._inner, 1)
    residual_ptr,  # as x_ptr of the forward: what was normalised; None with KIND 2
    branch_ptr,  # None or [rows, C], strides (branch_outer, branch_inner, 1)
    gamma_ptr,  # None or [C]
    drop_ptr,  # None or [B]: factor of the branch
    weight_ptr,  # None or [C]
    scale_ptr,  # None or [B]: factor of the norm
    stats_ptr,  # None or [rows, 2], contiguous, of the forward; None: computed again
    dx_ptr,  # None or out [rows, C], contiguous; MERGE: as x_ptr, the map [B, H, W, C / 4]
    dbranch_ptr,  # None or out [rows, C], contiguous
    dgamma_ptr,  # None or out [programs, C], ACC: sums over the program's rows
    dweight_ptr,  # None or out [programs, C], ACC
    dbias_ptr,  # None or out [programs, C], ACC
    rows,  # B * n
    n,  # rows of an entry of the first dimension
    c,  # C
    grad_outer, grad_inner,  # strides of the first dimension and of a row
    grad_residual_outer, grad_residual_inner,
    residual_outer, residual_inner,  # MERGE: of image and line
    branch_outer, branch_inner,
    residual_side,  # MERGE: stride of a pixel
    dx_outer, dx_inner, dx_side,  # MERGE: of image, line and pixel
    map_height, map_width,  # MERGE: H, W
    eps,
    KIND: tl.constexpr,  # 0 LayerNorm, 1 RMSNorm, 2 none
    BLOCK: tl.constexpr,  # power of two, at least C
    ACC: tl.constexpr,  # dtype of the arithmetic
    MERGE: tl.constexpr,  # whether rows are the 2x2 patches of a map
    ROWS: tl.constexpr,  # rows of a program at once
):  # fmt: skip
    """Gradients of the forward; each program takes every programs-th block of ROWS rows."""
    first = tl.program_id(0)
    column, inside = _columns(c, BLOCK, MERGE)
    dgamma = tl.zeros([BLOCK], ACC)
    dweight = tl.zeros([BLOCK], ACC)
    dbias = tl.zeros([BLOCK], ACC)
    for block in range(first, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.arange(0, ROWS).to(tl.int64) + block * ROWS
        live = row < rows
        mask = live[:, None] & inside[None, :]
        dr = tl.zeros([ROWS, BLOCK], ACC)
        if grad_residual_ptr is not None:
            at = _offsets(row, n, grad_residual_outer, grad_residual_inner)[:, None]
            at += column[None, :]
            dr = tl.load(grad_residual_ptr + at, mask=mask, other=0.0).to(ACC)
        if KIND != 2:
            at = _offsets(row, n, grad_outer, grad_inner)[:, None] + column[None, :]
            g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(ACC)
            if scale_ptr is not None:
                g *= tl.load(scale_ptr + row // n, mask=live, other=0.0).to(ACC)[:, None]
            if MERGE:
                at, exists = _pixels(
                    row, n, residual_outer, residual_inner, residual_side, map_height, map_width,
                    BLOCK,
                )  # fmt: skip
                r = tl.load(residual_ptr + at, mask=mask & exists, other=0.0).to(ACC)
            else:
                at = _offsets(row, n, residual_outer, residual_inner)[:, None] + column[None, :]
                r = tl.load(residual_ptr + at, mask=mask, other=0.0).to(ACC)
            if stats_ptr is not None:
                mean = tl.load(stats_ptr + row * 2, mask=live, other=0.0).to(ACC)
                rstd = tl.load(stats_ptr + row * 2 + 1, mask=live, other=0.0).to(ACC)
                xhat = tl.where(mask, (r - mean[:, None]) * rstd[:, None], 0.0)
            else:
                if KIND == 0:
                    r = tl.where(mask, r - (tl.sum(r, axis=1) / c)[:, None], 0.0)
                rstd = 1.0 / tl.sqrt(tl.sum(r * r, axis=1) / c + eps)
                xhat = r * rstd[:, None]
            if dbias_ptr is not None:
                dbias += tl.sum(g, axis=0)
            if weight_ptr is not None:
                dweight += tl.sum(g * xhat, axis=0)
                g *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(ACC)[None, :]
            d = g - xhat * (tl.sum(g * xhat, axis=1) / c)[:, None]
            if KIND == 0:
                d -= (tl.sum(g, axis=1) / c)[:, None]
            dr += d * rstd[:, None]
        out = row[:, None] * c + column[None, :]
        if MERGE:
            at, exists = _pixels(row, n, dx_outer, dx_inner, dx_side, map_height, map_width, BLOCK)
            tl.store(dx_ptr + at, dr.to(dx_ptr.dtype.element_ty), mask=mask & exists)
        elif dx_ptr is not None:
            tl.store(dx_ptr + out, dr.to(dx_ptr.dtype.element_ty), mask=mask)
        if drop_ptr is not None:
            dr *= tl.load(drop_ptr + row // n, mask=live, other=0.0).to(ACC)[:, None]
        if dgamma_ptr is not None:
            at = _offsets(row, n, branch_outer, branch_inner)[:, None] + column[None, :]
            b = tl.load(branch_ptr + at, mask=mask, other=0.0).to(ACC)
            dgamma += tl.sum(tl.where(mask, dr * b, 0.0), axis=0)
        if dbranch_ptr is not None:
            if gamma_ptr is not None:
                dr *= tl.load(gamma_ptr + column, mask=inside, other=0.0).to(ACC)[None, :]
            tl.store(dbranch_ptr + out, dr.to(dbranch_ptr.dtype.element_ty), mask=mask)
    at = first.to(tl.int64) * c + column
    if dgamma_ptr is not None:
        tl.store(dgamma_ptr + at, dgamma, mask=inside)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + at, dweight, mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + at, dbias, mask=inside)
