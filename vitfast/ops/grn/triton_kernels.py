"""Triton kernels of grn."""

from __future__ import annotations

import triton
import triton.language as tl

from vitfast.runtime.triton import COUNTS


@triton.jit
def _tile(row, column, inner, step):
    """Where a tile's elements are; 64 bits, since a tensor may hold more than 2^31 elements."""
    return row.to(tl.int64)[:, None] * inner + column.to(tl.int64)[None, :] * step


@triton.jit
def _over_rows(tile, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over a tile's rows; of many in two steps, since a sum in order would lose accuracy."""
    if ROWS <= 32:
        return tl.sum(tile, axis=0)
    return tl.sum(tl.sum(tl.reshape(tile, [ROWS // 8, 8, BLOCK]), axis=0), axis=0)


@triton.jit(do_not_specialize=COUNTS)
def sums_kernel(
    grad_ptr, x_ptr, products_ptr, plain_ptr, n, c, per, grad_outer, grad_inner, grad_step,
    x_outer, x_inner, x_step, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums over one part of an image: of x^2, or with a gradient of grad * x and of grad."""
    blocks, parts = tl.cdiv(c, BLOCK), tl.cdiv(n, per)
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks % parts
    b = (tl.program_id(0) // blocks // parts).to(tl.int64)
    column = block * BLOCK + tl.arange(0, BLOCK)
    end = tl.minimum((part + 1) * per, n)
    products = tl.zeros([ROWS, BLOCK], ACC)
    plain = tl.zeros([ROWS, BLOCK], ACC)
    for first in range(part * per, end, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & (column < c)[None, :]
        at = b * x_outer + _tile(row, column, x_inner, x_step)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
        if grad_ptr is None:
            products += x * x
        else:
            at = b * grad_outer + _tile(row, column, grad_inner, grad_step)
            g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(ACC)
            products += g * x
            plain += g
    to = (b * parts + part) * c + column
    tl.store(products_ptr + to, _over_rows(products, ROWS, BLOCK), mask=column < c)
    if grad_ptr is not None:
        tl.store(plain_ptr + to, _over_rows(plain, ROWS, BLOCK), mask=column < c)


@triton.jit
def _total(
    partial_ptr, b, parts, column, c, PARTS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
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
    squares_ptr, weight_ptr, norms_ptr, scale_ptr, per_image, c, eps,
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
    products_ptr, plain_ptr, weight_ptr, norms_ptr, scale_ptr, along_ptr, dweight_ptr, dbias_ptr,
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
    x_ptr, scale_ptr, bias_ptr, y_ptr, n, c, x_outer, x_inner, x_step, y_outer, y_inner, y_step,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = x + (x * scale + bias)."""
    blocks, tiles = tl.cdiv(c, BLOCK), tl.cdiv(n, ROWS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0) // blocks % tiles * ROWS + tl.arange(0, ROWS)
    b = (tl.program_id(0) // blocks // tiles).to(tl.int64)
    inside = column < c
    mask = (row < n)[:, None] & inside[None, :]
    at = b * x_outer + _tile(row, column, x_inner, x_step)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    scale = tl.load(scale_ptr + b * c + column, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(ACC)
    y = x + (x * scale[None, :] + bias[None, :])
    at = b * y_outer + _tile(row, column, y_inner, y_step)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    grad_ptr, x_ptr, scale_ptr, along_ptr, dx_ptr, n, c, grad_outer, grad_inner, grad_step,
    x_outer, x_inner, x_step, dx_outer, dx_inner, dx_step,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx = grad + (grad * scale + x * along)."""
    blocks, tiles = tl.cdiv(c, BLOCK), tl.cdiv(n, ROWS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0) // blocks % tiles * ROWS + tl.arange(0, ROWS)
    b = (tl.program_id(0) // blocks // tiles).to(tl.int64)
    inside = column < c
    mask = (row < n)[:, None] & inside[None, :]
    at = b * x_outer + _tile(row, column, x_inner, x_step)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    at = b * grad_outer + _tile(row, column, grad_inner, grad_step)
    g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(ACC)
    scale = tl.load(scale_ptr + b * c + column, mask=inside, other=0.0)
    along = tl.load(along_ptr + b * c + column, mask=inside, other=0.0)
    dx = g + (g * scale[None, :] + x * along[None, :])
    at = b * dx_outer + _tile(row, column, dx_inner, dx_step)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
