"""Triton kernels of group_norm_act. A map is [B, n, C], n pixels: `inner` the stride of pixels,
`step` that of channels, one of which is 1.

`whole` kernels hold GROUPS groups of an image; a group's channels stand at a multiple of SPAN, the
power of two from WIDTH on. The others hold tiles of ROWS pixels by BLOCK channels, and sums over
PARTS parts of an image by GROUPS groups, each SPAN channels at a time.

The dtype of what is computed is ACC: float32, or float64 of float64. x, y, residual, their
gradients, weight and bias may have any floating dtype each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitfast.ops.common.triton_tiles import offsets, over_rows, part_of, tile_of
from vitfast.runtime.triton import COUNTS


@triton.jit
def _channels(
    first, groups, start, WIDTH: tl.constexpr, SPAN: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """The channels of GROUPS groups from `first` on, SPAN of each from `start` on; which exist."""
    if GROUPS == 1:
        within = start + tl.arange(0, SPAN)
        return first * WIDTH + within, within < WIDTH
    slot = tl.arange(0, GROUPS * SPAN)
    group, within = first + slot // SPAN, start + slot % SPAN
    if WIDTH == SPAN:
        return first * WIDTH + slot, group < groups
    return group * WIDTH + within, (group < groups) & (within < WIDTH)


@triton.jit
def _over_groups(columns, SPAN: tl.constexpr, GROUPS: tl.constexpr):
    """Sums over the channels of each group."""
    return tl.sum(tl.reshape(columns, [GROUPS, SPAN]), axis=1)


@triton.jit
def _spread(values, SPAN: tl.constexpr, GROUPS: tl.constexpr):
    """A value a group to one a channel."""
    wide = tl.broadcast_to(values[:, None], [GROUPS, SPAN])
    return tl.reshape(wide, [GROUPS * SPAN])


@triton.jit
def _finish(
    d, scale,
    bias_ptr,  # [C], or None
    residual_ptr,  # at offsets residual_at, or None
    residual_at, column, inside, mask, RELU, ACC,
):  # fmt: skip
    """act(d * scale + bias + residual)."""
    y = d * scale[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(ACC)[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + residual_at, mask=mask, other=0.0).to(ACC)
    if RELU:
        y = tl.where(y <= 0.0, 0.0, y)  # NaN stays
    return y


@triton.jit
def _behind_act(
    grad_ptr,  # at offsets grad_at
    grad_at,
    y_ptr,  # at offsets y_at, or None
    y_at, mask, ACC,
):  # fmt: skip
    """The gradient, zero where ReLU's result is; NaN passes, as in torch."""
    g = tl.load(grad_ptr + grad_at, mask=mask, other=0.0).to(ACC)
    if y_ptr is not None:
        y = tl.load(y_ptr + y_at, mask=mask, other=0.0)
        g = tl.where(y <= 0.0, 0.0, g)
    return g


# ---- a program holds whole groups ----------------------------------------------------------------


@triton.jit(do_not_specialize=COUNTS)
def whole_kernel(
    x_ptr,  # [B, n, C], strides x_outer, x_inner, x_step
    weight_ptr,  # [C], or None
    bias_ptr,  # [C], or None
    residual_ptr,  # [B, n, C], strides residual_outer, residual_inner, residual_step; or None
    y_ptr,  # [B, n, C], strides y_outer, y_inner, y_step, written
    stats_ptr,  # [B, groups, 2], ACC: mean and 1 / sqrt(var + eps), written; or None
    pixels, groups,
    x_outer, x_inner, x_step, residual_outer, residual_inner, residual_step,
    y_outer, y_inner, y_step, eps,
    RELU: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr, GROUPS: tl.constexpr,
    PIXELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """act((x - mean) * rstd * weight + bias + residual) of whole groups, and their statistics."""
    blocks = tl.cdiv(groups, GROUPS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * GROUPS
    column, inside = _channels(first, groups, 0, WIDTH, SPAN, GROUPS)
    row = tl.arange(0, PIXELS)
    mask = (row < pixels)[:, None] & inside[None, :]
    at = b * x_outer + offsets(row, column, x_inner, x_step)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    count = pixels * WIDTH
    mean = _over_groups(over_rows(x, PIXELS, GROUPS * SPAN, 32), SPAN, GROUPS) / count
    # What the mean's rounding left: the groups' sums then are as good as their elements.
    d = tl.where(mask, x - _spread(mean, SPAN, GROUPS)[None, :], 0.0)
    mean += _over_groups(over_rows(d, PIXELS, GROUPS * SPAN, 32), SPAN, GROUPS) / count
    d = tl.where(mask, x - _spread(mean, SPAN, GROUPS)[None, :], 0.0)
    var = _over_groups(over_rows(d * d, PIXELS, GROUPS * SPAN, 32), SPAN, GROUPS) / count
    rstd = 1.0 / tl.sqrt(var + eps)
    scale = _spread(rstd, SPAN, GROUPS)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(ACC)
    residual_at = b * residual_outer + offsets(row, column, residual_inner, residual_step)
    y = _finish(
        d, scale, bias_ptr, residual_ptr, residual_at, column, inside, mask, RELU, ACC
    )  # fmt: skip
    at = b * y_outer + offsets(row, column, y_inner, y_step)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    if stats_ptr is not None:
        group = first + tl.arange(0, GROUPS)
        at = (b * groups + group) * 2
        tl.store(stats_ptr + at, mean, mask=group < groups)
        tl.store(stats_ptr + at + 1, rstd, mask=group < groups)


@triton.jit(do_not_specialize=COUNTS)
def whole_backward_kernel(
    grad_ptr,  # [B, n, C], strides grad_outer, grad_inner, grad_step
    x_ptr,  # [B, n, C], strides x_outer, x_inner, x_step
    y_ptr,  # [B, n, C], strides y_outer, y_inner, y_step; None: no ReLU
    weight_ptr,  # [C], or None
    stats_ptr,  # [B, groups, 2], ACC: mean and 1 / sqrt(var + eps)
    dx_ptr,  # [B, n, C], strides dx_outer, dx_inner, dx_step, written
    dresidual_ptr,  # as dx_ptr, or None
    dweight_ptr,  # [B, C], ACC, written: of each image; None without a weight
    dbias_ptr,  # [B, C], ACC, written: of each image; or None
    pixels, groups, grad_outer, grad_inner, grad_step, x_outer, x_inner, x_step,
    y_outer, y_inner, y_step, dx_outer, dx_inner, dx_step,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """All gradients of whole groups."""
    blocks = tl.cdiv(groups, GROUPS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * GROUPS
    column, inside = _channels(first, groups, 0, WIDTH, SPAN, GROUPS)
    row = tl.arange(0, PIXELS)
    mask = (row < pixels)[:, None] & inside[None, :]
    grad_at = b * grad_outer + offsets(row, column, grad_inner, grad_step)
    y_at = b * y_outer + offsets(row, column, y_inner, y_step)
    g = _behind_act(grad_ptr, grad_at, y_ptr, y_at, mask, ACC)
    to = b * dx_outer + offsets(row, column, dx_inner, dx_step)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + to, g.to(dresidual_ptr.dtype.element_ty), mask=mask)
    at = b * x_outer + offsets(row, column, x_inner, x_step)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    group = first + tl.arange(0, GROUPS)
    at = (b * groups + group) * 2
    mean = tl.load(stats_ptr + at, mask=group < groups, other=0.0)
    rstd = tl.load(stats_ptr + at + 1, mask=group < groups, other=0.0)
    factor = _spread(rstd, SPAN, GROUPS)
    xhat = tl.where(mask, (x - _spread(mean, SPAN, GROUPS)[None, :]) * factor[None, :], 0.0)
    plain = over_rows(g, PIXELS, GROUPS * SPAN, 32)
    product = over_rows(g * xhat, PIXELS, GROUPS * SPAN, 32)
    at = b * groups * WIDTH + column
    if dbias_ptr is not None:
        tl.store(dbias_ptr + at, plain, mask=inside)
    if weight_ptr is not None:
        tl.store(dweight_ptr + at, product, mask=inside)
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(ACC)
        g, plain, product = g * weight[None, :], plain * weight, product * weight
    count = pixels * WIDTH
    flat = _spread(_over_groups(plain, SPAN, GROUPS) / count, SPAN, GROUPS)
    slope = _spread(_over_groups(product, SPAN, GROUPS) / count, SPAN, GROUPS)
    dx = (g - (flat[None, :] + xhat * slope[None, :])) * factor[None, :]
    tl.store(dx_ptr + to, dx.to(dx_ptr.dtype.element_ty), mask=mask)


# ---- a program holds a tile ----------------------------------------------------------------------


@triton.jit(do_not_specialize=COUNTS)
def moments_kernel(
    x_ptr,  # [B, n, C], strides x_outer, x_inner, x_step
    mean_ptr,  # [B, parts, C], ACC, written
    rest_ptr,  # [B, parts, C], ACC, written
    square_ptr,  # [B, parts, C], ACC, written
    pixels, c, per, x_outer, x_inner, x_step,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of one part of an image, by channel: the mean, what its rounding left, and the sum of
    squares about it.

    Sums are taken about the mean of the part's first pixels. A part is `per` tiles.
    """
    b, part, parts, column = part_of(pixels, per * ROWS, c, BLOCK)
    head = part.to(tl.int64) * per * ROWS + tl.arange(0, ROWS)
    mask = (head < pixels)[:, None] & (column < c)[None, :]
    x_ptr += b * x_outer
    x = tl.load(x_ptr + offsets(head, column, x_inner, x_step), mask=mask, other=0.0).to(ACC)
    count = tl.minimum(pixels - part * per * ROWS, per * ROWS)
    shift = over_rows(x, ROWS, BLOCK, 32) / tl.minimum(count, ROWS)
    plain = tl.where(mask, x - shift[None, :], 0.0)
    square = plain * plain
    for tile in range(part * per + 1, tl.minimum((part + 1) * per, tl.cdiv(pixels, ROWS))):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < pixels)[:, None] & (column < c)[None, :]
        x = tl.load(x_ptr + offsets(row, column, x_inner, x_step), mask=mask, other=0.0).to(ACC)
        d = tl.where(mask, x - shift[None, :], 0.0)
        plain += d
        square += d * d
    total = over_rows(plain, ROWS, BLOCK, 32)
    off = total / count
    about = over_rows(square, ROWS, BLOCK, 32) - total * off
    to = (b * parts + part) * c + column
    mean = shift + off
    tl.store(mean_ptr + to, mean, mask=column < c)
    tl.store(rest_ptr + to, off - (mean - shift), mask=column < c)
    tl.store(square_ptr + to, tl.where(about < 0.0, 0.0, about), mask=column < c)  # NaN stays


@triton.jit(do_not_specialize=COUNTS)
def combine_kernel(
    mean_ptr,  # [B, parts, C], ACC
    rest_ptr,  # [B, parts, C], ACC
    square_ptr,  # [B, parts, C], ACC
    stats_ptr,  # [B, groups, 2], ACC: mean and 1 / sqrt(var + eps), written
    n, groups, per, eps,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The moments of some groups of an image, from those of parts and channels, in order."""
    blocks, parts = tl.cdiv(groups, GROUPS), tl.cdiv(n, per)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * GROUPS
    total = tl.zeros([PARTS, GROUPS * SPAN], ACC)
    for start in range(0, WIDTH, SPAN):
        column, inside = _channels(first, groups, start, WIDTH, SPAN, GROUPS)
        for lead in range(0, parts, PARTS):
            part = lead + tl.arange(0, PARTS)
            mask = (part < parts)[:, None] & inside[None, :]
            at = (b * parts + part)[:, None] * (groups * WIDTH) + column[None, :]
            share = tl.minimum(n - part * per, per).to(ACC) / n
            total += share[:, None] * tl.load(mean_ptr + at, mask=mask, other=0.0)
    mean = _over_groups(over_rows(total, PARTS, GROUPS * SPAN, 32), SPAN, GROUPS) / WIDTH
    about = _spread(mean, SPAN, GROUPS)[None, :]
    offs = tl.zeros([PARTS, GROUPS * SPAN], ACC)
    squares = tl.zeros([PARTS, GROUPS * SPAN], ACC)
    for start in range(0, WIDTH, SPAN):
        column, inside = _channels(first, groups, start, WIDTH, SPAN, GROUPS)
        for lead in range(0, parts, PARTS):
            part = lead + tl.arange(0, PARTS)
            mask = (part < parts)[:, None] & inside[None, :]
            at = (b * parts + part)[:, None] * (groups * WIDTH) + column[None, :]
            share = tl.minimum(n - part * per, per).to(ACC) / n
            # Channels far apart: a mean's rounding would be all that float32 leaves of d.
            rest = tl.load(rest_ptr + at, mask=mask, other=0.0)
            d = tl.where(mask, tl.load(mean_ptr + at, mask=mask, other=0.0) - about + rest, 0.0)
            offs += share[:, None] * d
            squares += tl.load(square_ptr + at, mask=mask, other=0.0) / n
            squares += share[:, None] * (d * d)
    # What the mean's rounding left.
    off = _over_groups(over_rows(offs, PARTS, GROUPS * SPAN, 32), SPAN, GROUPS) / WIDTH
    var = (
        _over_groups(over_rows(squares, PARTS, GROUPS * SPAN, 32), SPAN, GROUPS) / WIDTH - off * off
    )
    group = first + tl.arange(0, GROUPS)
    at = (b * groups + group) * 2
    tl.store(stats_ptr + at, mean + off, mask=group < groups)
    rstd = 1.0 / tl.sqrt(tl.where(var < 0.0, 0.0, var) + eps)  # NaN stays
    tl.store(stats_ptr + at + 1, rstd, mask=group < groups)


@triton.jit(do_not_specialize=COUNTS)
def apply_kernel(
    x_ptr,  # [B, n, C], strides x_outer, x_inner, x_step
    weight_ptr,  # [C], or None
    bias_ptr,  # [C], or None
    residual_ptr,  # [B, n, C], strides residual_outer, residual_inner, residual_step; or None
    y_ptr,  # [B, n, C], strides y_outer, y_inner, y_step, written
    stats_ptr,  # [B, groups, 2], ACC: mean and 1 / sqrt(var + eps)
    pixels, c,
    x_outer, x_inner, x_step, residual_outer, residual_inner, residual_step,
    y_outer, y_inner, y_step,
    RELU: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """act((x - mean) * rstd * weight + bias + residual) of a tile."""
    b, row, column, inside, mask = tile_of(pixels, c, ROWS, BLOCK)
    at = b * x_outer + offsets(row, column, x_inner, x_step)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    at = (b * (c // WIDTH) + column // WIDTH) * 2
    mean = tl.load(stats_ptr + at, mask=inside, other=0.0)
    scale = tl.load(stats_ptr + at + 1, mask=inside, other=0.0)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(ACC)
    residual_at = b * residual_outer + offsets(row, column, residual_inner, residual_step)
    y = _finish(
        x - mean[None, :], scale, bias_ptr, residual_ptr, residual_at, column, inside, mask,
        RELU, ACC,
    )  # fmt: skip
    at = b * y_outer + offsets(row, column, y_inner, y_step)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def sums_kernel(
    grad_ptr,  # [B, n, C], strides grad_outer, grad_inner, grad_step
    x_ptr,  # [B, n, C], strides x_outer, x_inner, x_step
    y_ptr,  # [B, n, C], strides y_outer, y_inner, y_step; None: no ReLU
    stats_ptr,  # [B, groups, 2], ACC: mean and 1 / sqrt(var + eps)
    plain_ptr,  # [B, parts, C], ACC, written
    product_ptr,  # [B, parts, C], ACC, written
    pixels, c, per,
    grad_outer, grad_inner, grad_step, x_outer, x_inner, x_step, y_outer, y_inner, y_step,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of one part of an image, by channel: the sums of the gradient, and of gradient * xhat."""
    b, part, parts, column = part_of(pixels, per * ROWS, c, BLOCK)
    inside = column < c
    at = (b * (c // WIDTH) + column // WIDTH) * 2
    mean = tl.load(stats_ptr + at, mask=inside, other=0.0)
    plain = tl.zeros([ROWS, BLOCK], ACC)
    product = tl.zeros([ROWS, BLOCK], ACC)
    for tile in range(part * per, tl.minimum((part + 1) * per, tl.cdiv(pixels, ROWS))):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < pixels)[:, None] & inside[None, :]
        grad_at = b * grad_outer + offsets(row, column, grad_inner, grad_step)
        y_at = b * y_outer + offsets(row, column, y_inner, y_step)
        g = _behind_act(grad_ptr, grad_at, y_ptr, y_at, mask, ACC)
        x_at = b * x_outer + offsets(row, column, x_inner, x_step)
        x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(ACC)
        plain += g
        product += g * tl.where(mask, x - mean[None, :], 0.0)
    rstd = tl.load(stats_ptr + at + 1, mask=inside, other=0.0)
    to = (b * parts + part) * c + column
    tl.store(plain_ptr + to, over_rows(plain, ROWS, BLOCK, 32), mask=inside)
    tl.store(product_ptr + to, over_rows(product, ROWS, BLOCK, 32) * rstd, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def factors_kernel(
    plain_ptr,  # [B, parts, C], ACC
    product_ptr,  # [B, parts, C], ACC
    weight_ptr,  # [C], or None
    factors_ptr,  # [B, groups, 2], ACC, written
    dweight_ptr,  # [B, C], ACC, written: of each image; None without a weight
    dbias_ptr,  # [B, C], ACC, written: of each image; or None
    n, groups, per,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The parts' sums added up in order: dweight and dbias, and as factors of each group the means
    of gradient * weight and of gradient * weight * xhat."""
    blocks, parts = tl.cdiv(groups, GROUPS), tl.cdiv(n, per)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * GROUPS
    count = n.to(ACC) * WIDTH
    flat = tl.zeros([GROUPS * SPAN], ACC)
    slope = tl.zeros([GROUPS * SPAN], ACC)
    for start in range(0, WIDTH, SPAN):
        column, inside = _channels(first, groups, start, WIDTH, SPAN, GROUPS)
        plains = tl.zeros([PARTS, GROUPS * SPAN], ACC)
        products = tl.zeros([PARTS, GROUPS * SPAN], ACC)
        for lead in range(0, parts, PARTS):
            part = lead + tl.arange(0, PARTS)
            mask = (part < parts)[:, None] & inside[None, :]
            at = (b * parts + part)[:, None] * (groups * WIDTH) + column[None, :]
            plains += tl.load(plain_ptr + at, mask=mask, other=0.0)
            products += tl.load(product_ptr + at, mask=mask, other=0.0)
        plain = over_rows(plains, PARTS, GROUPS * SPAN, 32)
        product = over_rows(products, PARTS, GROUPS * SPAN, 32)
        to = b * groups * WIDTH + column
        if dbias_ptr is not None:
            tl.store(dbias_ptr + to, plain, mask=inside)
        if weight_ptr is not None:
            tl.store(dweight_ptr + to, product, mask=inside)
            weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(ACC)
            plain, product = plain * weight, product * weight
        flat += plain
        slope += product
    group = first + tl.arange(0, GROUPS)
    at = (b * groups + group) * 2
    tl.store(factors_ptr + at, _over_groups(flat, SPAN, GROUPS) / count, mask=group < groups)
    tl.store(factors_ptr + at + 1, _over_groups(slope, SPAN, GROUPS) / count, mask=group < groups)


@triton.jit(do_not_specialize=COUNTS)
def gradient_kernel(
    grad_ptr,  # [B, n, C], strides grad_outer, grad_inner, grad_step
    x_ptr,  # [B, n, C], strides x_outer, x_inner, x_step
    y_ptr,  # [B, n, C], strides y_outer, y_inner, y_step; None: no ReLU
    weight_ptr,  # [C], or None
    stats_ptr,  # [B, groups, 2], ACC: mean and 1 / sqrt(var + eps)
    factors_ptr,  # [B, groups, 2], ACC: as `factors_kernel` writes them
    dx_ptr,  # [B, n, C], strides dx_outer, dx_inner, dx_step, written
    dresidual_ptr,  # as dx_ptr, or None
    pixels, c,
    grad_outer, grad_inner, grad_step, x_outer, x_inner, x_step, y_outer, y_inner, y_step,
    dx_outer, dx_inner, dx_step,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx = (g * weight - factors' means) * rstd of a tile, and dresidual = g."""
    b, row, column, inside, mask = tile_of(pixels, c, ROWS, BLOCK)
    grad_at = b * grad_outer + offsets(row, column, grad_inner, grad_step)
    y_at = b * y_outer + offsets(row, column, y_inner, y_step)
    g = _behind_act(grad_ptr, grad_at, y_ptr, y_at, mask, ACC)
    to = b * dx_outer + offsets(row, column, dx_inner, dx_step)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + to, g.to(dresidual_ptr.dtype.element_ty), mask=mask)
    at = b * x_outer + offsets(row, column, x_inner, x_step)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    at = (b * (c // WIDTH) + column // WIDTH) * 2
    mean = tl.load(stats_ptr + at, mask=inside, other=0.0)
    rstd = tl.load(stats_ptr + at + 1, mask=inside, other=0.0)
    flat = tl.load(factors_ptr + at, mask=inside, other=0.0)
    slope = tl.load(factors_ptr + at + 1, mask=inside, other=0.0) * rstd
    if weight_ptr is not None:
        g *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(ACC)[None, :]
    dx = (g - (flat[None, :] + (x - mean[None, :]) * slope[None, :])) * rstd[None, :]
    tl.store(dx_ptr + to, dx.to(dx_ptr.dtype.element_ty), mask=mask)
