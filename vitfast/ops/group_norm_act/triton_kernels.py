"""Triton kernels of group_norm_act. A map is [B, n, C], n pixels: `inner` the stride of pixels,
`step` that of channels, one of which is 1.

`whole` kernels hold GROUPS groups of an image; a group's channels stand at a multiple of SPAN, the
power of two from WIDTH on. The others hold tiles of ROWS pixels by BLOCK channels, and sums over
PARTS parts of an image by GROUPS groups, each SPAN channels at a time.
"""

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
    if ROWS > 32:
        tile = tl.sum(tl.reshape(tile, [ROWS // 32, 32, BLOCK]), axis=0)
    return tl.sum(tile, axis=0)


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
def _finish(d, scale, bias_ptr, residual_ptr, residual_at, column, inside, mask, RELU, ACC):
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
def _behind_act(grad_ptr, grad_at, y_ptr, y_at, mask, ACC):
    """The gradient, zero where ReLU's result is; NaN passes, as in torch."""
    g = tl.load(grad_ptr + grad_at, mask=mask, other=0.0).to(ACC)
    if y_ptr is not None:
        y = tl.load(y_ptr + y_at, mask=mask, other=0.0)
        g = tl.where(y <= 0.0, 0.0, g)
    return g


# ---- a program holds whole groups ----------------------------------------------------------------


@triton.jit(do_not_specialize=COUNTS)
def whole_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, stats_ptr, pixels, groups,
    x_outer, x_inner, x_step, residual_outer, residual_inner, residual_step,
    y_outer, y_inner, y_step, eps,
    RELU: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr, GROUPS: tl.constexpr,
    PIXELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(groups, GROUPS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * GROUPS
    column, inside = _channels(first, groups, 0, WIDTH, SPAN, GROUPS)
    row = tl.arange(0, PIXELS)
    mask = (row < pixels)[:, None] & inside[None, :]
    at = b * x_outer + _tile(row, column, x_inner, x_step)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    count = pixels * WIDTH
    mean = _over_groups(_over_rows(x, PIXELS, GROUPS * SPAN), SPAN, GROUPS) / count
    # What the mean's rounding left: the groups' sums then are as good as their elements.
    d = tl.where(mask, x - _spread(mean, SPAN, GROUPS)[None, :], 0.0)
    mean += _over_groups(_over_rows(d, PIXELS, GROUPS * SPAN), SPAN, GROUPS) / count
    d = tl.where(mask, x - _spread(mean, SPAN, GROUPS)[None, :], 0.0)
    var = _over_groups(_over_rows(d * d, PIXELS, GROUPS * SPAN), SPAN, GROUPS) / count
    rstd = 1.0 / tl.sqrt(var + eps)
    scale = _spread(rstd, SPAN, GROUPS)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(ACC)
    residual_at = b * residual_outer + _tile(row, column, residual_inner, residual_step)
    y = _finish(
        d, scale, bias_ptr, residual_ptr, residual_at, column, inside, mask, RELU, ACC
    )  # fmt: skip
    at = b * y_outer + _tile(row, column, y_inner, y_step)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    if stats_ptr is not None:
        group = first + tl.arange(0, GROUPS)
        at = (b * groups + group) * 2
        tl.store(stats_ptr + at, mean, mask=group < groups)
        tl.store(stats_ptr + at + 1, rstd, mask=group < groups)


@triton.jit(do_not_specialize=COUNTS)
def whole_backward_kernel(
    grad_ptr, x_ptr, y_ptr, weight_ptr, stats_ptr, dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    pixels, groups, grad_outer, grad_inner, grad_step, x_outer, x_inner, x_step,
    y_outer, y_inner, y_step, dx_outer, dx_inner, dx_step,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """dresidual lies as dx does; dweight and dbias are of each image: [B, C]."""
    blocks = tl.cdiv(groups, GROUPS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * GROUPS
    column, inside = _channels(first, groups, 0, WIDTH, SPAN, GROUPS)
    row = tl.arange(0, PIXELS)
    mask = (row < pixels)[:, None] & inside[None, :]
    grad_at = b * grad_outer + _tile(row, column, grad_inner, grad_step)
    y_at = b * y_outer + _tile(row, column, y_inner, y_step)
    g = _behind_act(grad_ptr, grad_at, y_ptr, y_at, mask, ACC)
    to = b * dx_outer + _tile(row, column, dx_inner, dx_step)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + to, g.to(dresidual_ptr.dtype.element_ty), mask=mask)
    at = b * x_outer + _tile(row, column, x_inner, x_step)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    group = first + tl.arange(0, GROUPS)
    at = (b * groups + group) * 2
    mean = tl.load(stats_ptr + at, mask=group < groups, other=0.0)
    rstd = tl.load(stats_ptr + at + 1, mask=group < groups, other=0.0)
    factor = _spread(rstd, SPAN, GROUPS)
    xhat = tl.where(mask, (x - _spread(mean, SPAN, GROUPS)[None, :]) * factor[None, :], 0.0)
    plain = _over_rows(g, PIXELS, GROUPS * SPAN)
    product = _over_rows(g * xhat, PIXELS, GROUPS * SPAN)
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
    x_ptr, mean_ptr, rest_ptr, square_ptr, pixels, c, per, x_outer, x_inner, x_step,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of one part of an image, by channel: the mean, what its rounding left, and the sum of
    squares about it; each [B, parts, C].

    Sums are taken about the mean of the part's first pixels. A part is `per` tiles.
    """
    blocks, parts = tl.cdiv(c, BLOCK), tl.cdiv(pixels, per * ROWS)
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks % parts
    b = (tl.program_id(0) // blocks // parts).to(tl.int64)
    column = block * BLOCK + tl.arange(0, BLOCK)
    head = part.to(tl.int64) * per * ROWS + tl.arange(0, ROWS)
    mask = (head < pixels)[:, None] & (column < c)[None, :]
    x_ptr += b * x_outer
    x = tl.load(x_ptr + _tile(head, column, x_inner, x_step), mask=mask, other=0.0).to(ACC)
    count = tl.minimum(pixels - part * per * ROWS, per * ROWS)
    shift = _over_rows(x, ROWS, BLOCK) / tl.minimum(count, ROWS)
    plain = tl.where(mask, x - shift[None, :], 0.0)
    square = plain * plain
    for tile in range(part * per + 1, tl.minimum((part + 1) * per, tl.cdiv(pixels, ROWS))):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < pixels)[:, None] & (column < c)[None, :]
        x = tl.load(x_ptr + _tile(row, column, x_inner, x_step), mask=mask, other=0.0).to(ACC)
        d = tl.where(mask, x - shift[None, :], 0.0)
        plain += d
        square += d * d
    total = _over_rows(plain, ROWS, BLOCK)
    off = total / count
    about = _over_rows(square, ROWS, BLOCK) - total * off
    to = (b * parts + part) * c + column
    mean = shift + off
    tl.store(mean_ptr + to, mean, mask=column < c)
    tl.store(rest_ptr + to, off - (mean - shift), mask=column < c)
    tl.store(square_ptr + to, tl.where(about < 0.0, 0.0, about), mask=column < c)  # NaN stays


@triton.jit(do_not_specialize=COUNTS)
def combine_kernel(
    mean_ptr, rest_ptr, square_ptr, stats_ptr, n, groups, per, eps,
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
    mean = _over_groups(_over_rows(total, PARTS, GROUPS * SPAN), SPAN, GROUPS) / WIDTH
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
    off = _over_groups(_over_rows(offs, PARTS, GROUPS * SPAN), SPAN, GROUPS) / WIDTH
    var = _over_groups(_over_rows(squares, PARTS, GROUPS * SPAN), SPAN, GROUPS) / WIDTH - off * off
    group = first + tl.arange(0, GROUPS)
    at = (b * groups + group) * 2
    tl.store(stats_ptr + at, mean + off, mask=group < groups)
    rstd = 1.0 / tl.sqrt(tl.where(var < 0.0, 0.0, var) + eps)  # NaN stays
    tl.store(stats_ptr + at + 1, rstd, mask=group < groups)


@triton.jit(do_not_specialize=COUNTS)
def apply_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, stats_ptr, pixels, c,
    x_outer, x_inner, x_step, residual_outer, residual_inner, residual_step,
    y_outer, y_inner, y_step,
    RELU: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """act((x - mean) * rstd * weight + bias + residual) of a tile."""
    blocks, tiles = tl.cdiv(c, BLOCK), tl.cdiv(pixels, ROWS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0) // blocks % tiles * ROWS + tl.arange(0, ROWS)
    b = (tl.program_id(0) // blocks // tiles).to(tl.int64)
    inside = column < c
    mask = (row < pixels)[:, None] & inside[None, :]
    at = b * x_outer + _tile(row, column, x_inner, x_step)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    at = (b * (c // WIDTH) + column // WIDTH) * 2
    mean = tl.load(stats_ptr + at, mask=inside, other=0.0)
    scale = tl.load(stats_ptr + at + 1, mask=inside, other=0.0)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(ACC)
    residual_at = b * residual_outer + _tile(row, column, residual_inner, residual_step)
    y = _finish(
        x - mean[None, :], scale, bias_ptr, residual_ptr, residual_at, column, inside, mask,
        RELU, ACC,
    )  # fmt: skip
    at = b * y_outer + _tile(row, column, y_inner, y_step)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def sums_kernel(
    grad_ptr, x_ptr, y_ptr, stats_ptr, plain_ptr, product_ptr, pixels, c, per,
    grad_outer, grad_inner, grad_step, x_outer, x_inner, x_step, y_outer, y_inner, y_step,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of one part of an image, by channel: the sums of the gradient, and of gradient * xhat."""
    blocks, parts = tl.cdiv(c, BLOCK), tl.cdiv(pixels, per * ROWS)
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks % parts
    b = (tl.program_id(0) // blocks // parts).to(tl.int64)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < c
    at = (b * (c // WIDTH) + column // WIDTH) * 2
    mean = tl.load(stats_ptr + at, mask=inside, other=0.0)
    plain = tl.zeros([ROWS, BLOCK], ACC)
    product = tl.zeros([ROWS, BLOCK], ACC)
    for tile in range(part * per, tl.minimum((part + 1) * per, tl.cdiv(pixels, ROWS))):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < pixels)[:, None] & inside[None, :]
        grad_at = b * grad_outer + _tile(row, column, grad_inner, grad_step)
        y_at = b * y_outer + _tile(row, column, y_inner, y_step)
        g = _behind_act(grad_ptr, grad_at, y_ptr, y_at, mask, ACC)
        x_at = b * x_outer + _tile(row, column, x_inner, x_step)
        x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(ACC)
        plain += g
        product += g * tl.where(mask, x - mean[None, :], 0.0)
    rstd = tl.load(stats_ptr + at + 1, mask=inside, other=0.0)
    to = (b * parts + part) * c + column
    tl.store(plain_ptr + to, _over_rows(plain, ROWS, BLOCK), mask=inside)
    tl.store(product_ptr + to, _over_rows(product, ROWS, BLOCK) * rstd, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def factors_kernel(
    plain_ptr, product_ptr, weight_ptr, factors_ptr, dweight_ptr, dbias_ptr, n, groups, per,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The parts' sums added up in order: dweight and dbias [B, C], and by group [B, groups, 2] the
    means of gradient * weight and of gradient * weight * xhat."""
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
        plain = _over_rows(plains, PARTS, GROUPS * SPAN)
        product = _over_rows(products, PARTS, GROUPS * SPAN)
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
    grad_ptr, x_ptr, y_ptr, weight_ptr, stats_ptr, factors_ptr, dx_ptr, dresidual_ptr, pixels, c,
    grad_outer, grad_inner, grad_step, x_outer, x_inner, x_step, y_outer, y_inner, y_step,
    dx_outer, dx_inner, dx_step,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx = (g * weight - factors' means) * rstd of a tile; dresidual lies as dx does."""
    blocks, tiles = tl.cdiv(c, BLOCK), tl.cdiv(pixels, ROWS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0) // blocks % tiles * ROWS + tl.arange(0, ROWS)
    b = (tl.program_id(0) // blocks // tiles).to(tl.int64)
    inside = column < c
    mask = (row < pixels)[:, None] & inside[None, :]
    grad_at = b * grad_outer + _tile(row, column, grad_inner, grad_step)
    y_at = b * y_outer + _tile(row, column, y_inner, y_step)
    g = _behind_act(grad_ptr, grad_at, y_ptr, y_at, mask, ACC)
    to = b * dx_outer + _tile(row, column, dx_inner, dx_step)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + to, g.to(dresidual_ptr.dtype.element_ty), mask=mask)
    at = b * x_outer + _tile(row, column, x_inner, x_step)
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
