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
    x_ptr, branch_ptr, gamma_ptr, drop_ptr, weight_ptr, bias_ptr, base_ptr, scale_ptr,
    residual_ptr, normed_ptr, stats_ptr, rows, n, c, x_outer, x_inner, branch_outer, branch_inner,
    base_outer, base_inner, x_side, map_height, map_width, eps,
    KIND: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, MERGE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
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
    grad_ptr, grad_residual_ptr, residual_ptr, branch_ptr, gamma_ptr, drop_ptr, weight_ptr,
    scale_ptr, stats_ptr, dx_ptr, dbranch_ptr, dgamma_ptr, dweight_ptr, dbias_ptr, rows, n, c,
    grad_outer, grad_inner, grad_residual_outer, grad_residual_inner, residual_outer,
    residual_inner, branch_outer, branch_inner, residual_side, dx_outer, dx_inner, dx_side,
    map_height, map_width, eps,
    KIND: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, MERGE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
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
