"""Inference on the CPU of what makes and changes maps: patches, downsampling, ConvNeXt's block.

As `_inference`, some lines or images at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from vitfast.layers import _fits, _memo, _rows
from vitfast.layers._rows import Halves, Layer
from vitfast.ops.common import norm as norm_op
from vitfast.ops.dwconv_norm import native as dwconv_op
from vitfast.ops.grn import native as grn_op
from vitfast.ops.patch_embed import native as patch_op
from vitfast.plans import ConvNeXtBlock, Grn, Linear, Norm, Patches, PatchMerging
from vitfast.runtime import native
from vitfast.runtime.library import autocast_dtype

if TYPE_CHECKING:
    pass
    pass

_CONVOLVED_BYTES = 4 << 20
"""Of a convolution's results at a time: each stripe of lines reads those around it again."""
_HIDDEN_BYTES = 3 << 20
_LEAST_ROWS = 512
"""Of an MLP's hidden tensor at a time, and rows at least."""


def merge(x: torch.Tensor, plan: PatchMerging) -> torch.Tensor | None:
    """2x2 patches of a map x [B, H, W, C] reduced; None where it is for the public ops."""
    return _memo.call(_merge, _merge_steps, _rows.count(x) // 4, x, plan)


class _Reduction(NamedTuple):
    """A downsampling ready to run, its products in dtype `operand`."""

    plan: PatchMerging | Patches
    operand: torch.dtype
    linear: Layer


def _merge_steps(
    x: torch.Tensor, plan: PatchMerging, lower: torch.dtype | None
) -> _Reduction | None:
    operand = lower or x.dtype
    if not _fits.on_cpu(x, lower):
        return None
    shape = norm_op.merged_shape(x)
    weight, bias = plan.reduction
    dtypes = norm_op.DTYPES if lower else (x.dtype,)
    width = len(weight) if plan.norm_last else shape[-1]
    if not (
        _fits.tensor(weight, (len(weight), shape[-1]), dtypes)
        and _fits.vector(bias, len(weight), dtypes)
        and _fits.vector(plan.norm.weight, width)
        and _fits.vector(plan.norm.bias, width)
    ):
        return None
    return _Reduction(plan, operand, _rows.linear(plan.reduction, math.prod(shape[:3]), operand))


def _merge(steps: _Reduction, x: torch.Tensor) -> torch.Tensor:
    plan, operand, reduction = steps
    shape = batch, high, wide, _ = norm_op.merged_shape(x)

    def patches(part: torch.Tensor) -> torch.Tensor:
        if plan.norm_last:
            found = norm_op.forward(norm_op.NONE, part, out_dtype=operand, merge=True)[0]
        else:
            found = norm_op.forward(
                norm_op.KINDS[plan.norm.kind], part, weight=plan.norm.weight, bias=plan.norm.bias,
                eps=plan.norm.eps, out_dtype=operand, merge=True,
            )[1]  # fmt: skip
        y = reduction(found.view(-1, shape[-1]))
        return _rows.normalise(y, plan.norm, y) if plan.norm_last else y

    if batch * high * wide <= _rows.WHOLE_ROWS:
        return patches(x).view(batch, high, wide, -1)
    width = len(plan.reduction.weight)
    out = native.empty((batch, high, wide, width), operand)
    step = max(1, _rows.CHUNK_ROWS // wide)
    for image, result in zip(x, out, strict=True):
        for first in range(0, high, step):
            part = image[None, 2 * first : 2 * (first + step)]
            result[first : first + step] = patches(part).view(-1, wide, width)
    return out


def embed(
    image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: Norm
) -> torch.Tensor | None:
    """norm(tokens) [B, N, C] of an image's patches; None where it is for the public ops.

    Tokens are normalised while they are in the cache.
    """
    lower = autocast_dtype(image.device)
    operand = lower or image.dtype
    dtypes = norm_op.DTYPES if lower else (image.dtype,)
    channels = len(weight)
    if not (
        _fits.on_cpu(image, lower)
        and image.shape[1] == weight.shape[1]
        and weight.dtype in dtypes
        and weight.is_cpu
        and _fits.vector(bias, channels, dtypes)
        and _fits.vector(norm.weight, channels)
        and _fits.vector(norm.bias, channels)
    ):
        return None
    return patch_op.normed(image, weight, bias, operand, lambda x: _rows.normalise(x, norm, x))


def downsample(x: torch.Tensor, plan: Patches) -> torch.Tensor | None:
    """Patches [B, N, C'] of norm(x), of a map [B, H, W, C]; None as of `embed`."""
    return _memo.call(_downsample, _downsample_steps, _rows.count(x), x, plan)


def _downsample_steps(
    x: torch.Tensor, plan: Patches, lower: torch.dtype | None
) -> _Reduction | None:
    (weight, bias), norm = plan.projection, plan.norm
    operand = lower or x.dtype
    dtypes = norm_op.DTYPES if lower else (x.dtype,)
    batch, high, wide, channels = x.shape
    width, _, height, across = weight.shape
    if not (
        _fits.on_cpu(x, lower)
        and _fits.tensor(weight, (width, channels, height, across), dtypes)
        and _fits.vector(bias, width, dtypes)
        and _fits.vector(norm.weight, channels)
        and _fits.vector(norm.bias, channels)
    ):
        return None
    rows = batch * (high // height) * (wide // across)
    linear = _rows.linear(Linear(weight, bias), rows, operand, channels_last=True)
    return _Reduction(plan, operand, linear)


def _downsample(steps: _Reduction, x: torch.Tensor) -> torch.Tensor:
    plan, operand, linear = steps
    batch, high, wide, channels = x.shape
    width, _, height, across = plan.projection.weight.shape
    lines, columns = high // height, wide // across
    out = native.empty((batch, lines, columns, width), operand)
    x = x.contiguous()
    for images, stripes in _stripes(batch, lines, columns, _rows.CHUNK_ROWS):
        for first, last in stripes:
            part = x[images, first * height : last * height]
            part = part.view(-1, height, columns, across, channels)
            rows = torch.empty(
                (len(part), columns, height, across, channels), dtype=operand, device="cpu"
            )
            for i, j in itertools.product(range(height), range(across)):
                _rows.normalise(part[:, i, :, j], plan.norm, rows[:, :, i, j])
            result = out[images, first:last].view(-1, width)
            linear.into(rows.view(-1, height * across * channels), result)
    return out.view(batch, -1, width)


def convnext(x: torch.Tensor, plan: ConvNeXtBlock) -> torch.Tensor | None:
    """ConvNeXt's block on a map x [B, H, W, C], some lines or images at a time.

    None where it is for the public ops.
    """
    return _memo.call(_convnext, _convnext_steps, _rows.count(x), x, plan)


def _convnext(steps: _Steps, x: torch.Tensor) -> torch.Tensor:
    plan, operand, dtype, halves = steps
    x = x.contiguous()
    out = native.empty(x.shape, dtype)
    rows_in, rows_out = (t.view(-1, t.shape[3]) for t in (x, out))
    mlp = plan.mlp

    def finish(rows: slice, hidden: Sequence[torch.Tensor]) -> None:
        before, after = _rows.part(rows_in, rows), _rows.part(rows_out, rows)
        halves.add_to(before, plan.gamma, hidden, after)

    for images, pieces in convolved(x, plan, operand):
        if mlp.grn is None:
            for rows, normed in pieces:
                finish(rows, halves.hidden(normed))
            continue
        hiddens = [(rows, halves.hidden(normed)) for rows, normed in pieces]
        scales = _responses([hidden for _, hidden in hiddens], images, mlp.grn)
        for rows, hidden in hiddens:
            _respond(hidden, scales, mlp.grn.bias)
            finish(rows, hidden)
    return out


def _convnext_steps(
    x: torch.Tensor, plan: ConvNeXtBlock, lower: torch.dtype | None
) -> _Steps | None:
    if not _fits.convnext(x, plan, lower):
        return None
    operand = lower or x.dtype
    scaled = operand if plan.gamma is None else torch.promote_types(operand, plan.gamma.dtype)
    halves = _rows.mlp(plan.mlp, _rows.count(x), operand)
    return _Steps(plan, operand, torch.promote_types(x.dtype, scaled), halves)


class _Steps(NamedTuple):
    """A block ready to run. dtype: of the result."""

    plan: ConvNeXtBlock
    operand: torch.dtype
    dtype: torch.dtype
    halves: Halves


Piece = tuple[slice, torch.Tensor]


def convolved(
    x: torch.Tensor, plan: ConvNeXtBlock, operand: torch.dtype
) -> Iterator[tuple[int, Iterator[Piece]]]:
    """norm(conv(x)) of contiguous maps, by group of images: how many, and their pieces.

    A piece is some of the B * H * W rows and what they are. It holds all of every image if it holds
    several images' and there is a global response norm.
    """
    batch, high, wide, channels = x.shape
    at_once = max(_CONVOLVED_BYTES // (channels * operand.itemsize), _rows.CHUNK_ROWS)
    most = max(_HIDDEN_BYTES // (len(plan.mlp.fc1.weight) * operand.itemsize), _LEAST_ROWS)
    for images, stripes in _stripes(batch, high, wide, at_once):
        count = images.stop - images.start
        whole = plan.mlp.grn is not None and count > 1
        step = count * high * wide if whole else most
        yield count, _pieces(x, plan, operand, images, stripes, step)


def _pieces(
    x: torch.Tensor,
    plan: ConvNeXtBlock,
    operand: torch.dtype,
    images: slice,
    stripes: list[tuple[int, int]],
    most: int,
) -> Iterator[Piece]:
    norm = plan.norm
    _, high, wide, channels = x.shape
    for first, last in stripes:
        normed = dwconv_op.run(
            _rows.part(x, images), *plan.conv, norm.weight, norm.bias, norm.eps, norm=norm.kind,
            dtype=operand, out_dtype=operand, rows=(first, last),
        ).view(-1, channels)  # fmt: skip
        start = (images.start * high + first) * wide
        count = normed.shape[0]
        for i in range(0, count, most):
            last = min(i + most, count)
            yield slice(start + i, start + last), _rows.part(normed, slice(i, last))


def _stripes(
    batch: int, high: int, wide: int, rows: int
) -> list[tuple[slice, list[tuple[int, int]]]]:
    """Some images and all of their lines, or one and so many rows at a time."""
    if high * wide <= _rows.WHOLE_ROWS:
        images = _rows.WHOLE_ROWS // (high * wide)
        starts = range(0, batch, images)
        return [(slice(i, min(i + images, batch)), [(0, high)]) for i in starts]
    step = max(1, rows // wide)
    lines = [(i, min(i + step, high)) for i in range(0, high, step)]
    return [(slice(i, i + 1), lines) for i in range(batch)]


def _responses(hiddens: list[Sequence[torch.Tensor]], images: int, grn: Grn) -> torch.Tensor:
    """1 + weight * n [images, 4C] of a global response norm, from all rows of the images."""
    widths = [piece.shape[1] for piece in hiddens[0]]
    sums = torch.empty((images, sum(widths)), dtype=torch.float64, device="cpu")
    for i, hidden in enumerate(hiddens):
        for piece, totals in zip(hidden, sums.split(widths, 1), strict=True):
            for one, total in zip(piece.chunk(images), totals, strict=True):
                grn_op.accumulate(one, total, adds=i > 0)
    return grn_op.scale_of(sums, grn.weight, grn.eps)


def _respond(hidden: Sequence[torch.Tensor], scales: torch.Tensor, bias: torch.Tensor) -> None:
    """bias + scale * hidden in place, by image and piece of columns."""
    widths = [piece.shape[1] for piece in hidden]
    columns = scales.split(widths, 1), bias.float().split(widths)
    for piece, factors, shift in zip(hidden, *columns, strict=True):
        for one, factor in zip(piece.chunk(len(scales)), factors, strict=True):
            base = shift.expand(one.shape)
            out = one if one.dtype == base.dtype else None
            terms = dict(branch=one, gamma=factor, residual_out=out)
            wide, _, _ = norm_op.forward(norm_op.NONE, base, **terms)
            if out is None:
                norm_op.forward(norm_op.NONE, wide, residual_out=one)
