"""Triton kernels of grn: sums over the n positions of an image, then the result, each a launch.

Floors, in tensors read or written: forward 3 (read x twice, write the result), backward 5 (read x
and the gradient twice, write x's). Sums over positions go to one partial row a program, whose
positions depend on the image's size alone: the same bits every time, whatever else is in the batch.
Maps with contiguous channels and planar ones (NCHW) differ in the strides and the tile's shape.

The dtype of what is computed is ACC: float32, or float64 of float64. x, y, grad, dx, weight and
bias may have any floating dtype each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitfast.ops.common.triton_tiles import offsets, over_rows, part_of, tile_of
from vitfast.runtime.triton import COUNTS


@triton.jit(do_not_specialize=COUNTS)
def sums_kernel(
    grad_ptr,  # [B, n, C], strides grad_outer, grad_inner, grad_step; or None
    x_ptr,  # [B, n, C], strides x_outer, x_inner, x_step
    products_ptr,  # [B, parts, C], ACC
    plain_ptr,  # [B, parts, C], ACC; None without a gradient
    n, c, per, grad_outer, grad_inner, grad_step, x_outer, x_inner, x_step,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums over `per` positions of an image: of x^2, or with a gradient of grad * x and of grad."""
    b, part, parts, column = part_of(n, per, c, BLOCK)
    end = tl.minimum((part + 1) * per, n)
    products = tl.zeros([ROWS, BLOCK], ACC)
    plain = tl.zeros([ROWS, BLOCK], ACC)
    for first in range(part * per, end, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & (column < c)[None, :]
        at = b * x_outer + offsets(row, column, x_inner, x_step)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
        if grad_ptr is None:
            products += x * x
        else:
            at = b * grad_outer + offsets(row, column, grad_inner, grad_step)
            g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(ACC)
            products += g * x
            plain += g
    to = (b * parts + part) * c + column
    tl.store(products_ptr + to, over_rows(products, ROWS, BLOCK, 8), mask=column < c)
    if grad_ptr is not None:
        tl.store(plain_ptr + to, over_rows(plain, ROWS, BLOCK, 8), mask=column < c)


@triton.jit
def _total(
    partial_ptr,  # [B, parts, C], ACC
    b, parts, column, c, PARTS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """An image's partial sums of some channels added up, in order."""
    total = tl.zeros([PARTS, BLOCK], ACC)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        at = (b * parts + part)[:, None] * c + column[None, :]
        mask = (part < parts)[:, None] & (column < c)[None, :]
        total += tl.load(partial_ptr + at, mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=COUNTS)
def scale_kernel(
    squares_ptr,  # [B, per_image, C], ACC
    weight_ptr,  # [C]
    norms_ptr,  # [B, C], ACC, written
    scale_ptr,  # [B, C], ACC, written
    per_image, c, eps,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """An image's norms, and scale = weight * n."""
    b = tl.program_id(0).to(tl.int64)
    norms = tl.zeros([BLOCK], ACC)
    for first in range(0, c, BLOCK):
        column = first + tl.arange(0, BLOCK)
        g = tl.sqrt(_total(squares_ptr, b, per_image, column, c, PARTS, BLOCK, ACC))
        norms += g
        tl.store(norms_ptr + b * c + column, g, mask=column < c)
    m = tl.sum(norms) / c + eps
    for first in range(0, c, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < c
        g = tl.sqrt(_total(squares_ptr, b, per_image, column, c, PARTS, BLOCK, ACC))
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(ACC)
        tl.store(scale_ptr + b * c + column, weight * (g / m), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def factors_kernel(
    products_ptr,  # [B, per_image, C], ACC
    plain_ptr,  # [B, per_image, C], ACC
    weight_ptr,  # [C]
    norms_ptr,  # [B, C], ACC
    scale_ptr,  # [B, C], ACC, written
    along_ptr,  # [B, C], ACC, written
    dweight_ptr,  # [B, C], ACC, written: of each image
    dbias_ptr,  # [B, C], ACC, written: of each image
    per_image, c, eps, PARTS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """In an image, the factors of the gradient and of x in dx, and what it adds to dweight, dbias.

    With P = sum of grad * x, m = mean of g + eps, dn = weight P: x's factor is
    (dn - mean of (dn g) / m) / (m g).
    """
    b = tl.program_id(0).to(tl.int64)
    norms = tl.zeros([BLOCK], ACC)
    along_norms = tl.zeros([BLOCK], ACC)
    for first in range(0, c, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < c
        g = tl.load(norms_ptr + b * c + column, mask=inside, other=0.0)
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(ACC)
        norms += g
        products = _total(products_ptr, b, per_image, column, c, PARTS, BLOCK, ACC)
        along_norms += weight * products * g
    m = tl.sum(norms) / c + eps
    shared = tl.sum(along_norms) / c / m
    for first in range(0, c, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside, at = column < c, b * c + column
        plain = _total(plain_ptr, b, per_image, column, c, PARTS, BLOCK, ACC)
        tl.store(dbias_ptr + at, plain, mask=inside)
        products = _total(products_ptr, b, per_image, column, c, PARTS, BLOCK, ACC)
        g = tl.load(norms_ptr + at, mask=inside, other=0.0)
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(ACC)
        n = g / m
        tl.store(dweight_ptr + at, n * products, mask=inside)
        tl.store(scale_ptr + at, weight * n, mask=inside)
        # A channel without energy has no direction to go along: its x is zero too.
        along = (weight * products - shared) / m / tl.where(g == 0.0, 1.0, g)
        tl.store(along_ptr + at, along, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    x_ptr,  # [B, n, C], strides x_outer, x_inner, x_step
    scale_ptr,  # [B, C], ACC
    bias_ptr,  # [C]
    y_ptr,  # [B, n, C], strides y_outer, y_inner, y_step, written
    n, c, x_outer, x_inner, x_step, y_outer, y_inner, y_step,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = x + (x * scale + bias)."""
    b, row, column, inside, mask = tile_of(n, c, ROWS, BLOCK)
    at = b * x_outer + offsets(row, column, x_inner, x_step)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    scale = tl.load(scale_ptr + b * c + column, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(ACC)
    y = x + (x * scale[None, :] + bias[None, :])
    at = b * y_outer + offsets(row, column, y_inner, y_step)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    grad_ptr,  # [B, n, C], strides grad_outer, grad_inner, grad_step
    x_ptr,  # [B, n, C], strides x_outer, x_inner, x_step
    scale_ptr,  # [B, C], ACC
    along_ptr,  # [B, C], ACC
    dx_ptr,  # [B, n, C], strides dx_outer, dx_inner, dx_step, written
    n, c, grad_outer, grad_inner, grad_step, x_outer, x_inner, x_step, dx_outer, dx_inner, dx_step,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx = grad + (grad * scale + x * along)."""
    b, row, column, inside, mask = tile_of(n, c, ROWS, BLOCK)
    at = b * x_outer + offsets(row, column, x_inner, x_step)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    at = b * grad_outer + offsets(row, column, grad_inner, grad_step)
    g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(ACC)
    scale = tl.load(scale_ptr + b * c + column, mask=inside, other=0.0)
    along = tl.load(along_ptr + b * c + column, mask=inside, other=0.0)
    dx = g + (g * scale[None, :] + x * along[None, :])
    at = b * dx_outer + offsets(row, column, dx_inner, dx_step)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
