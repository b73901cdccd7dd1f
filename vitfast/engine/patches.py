"""Patches and downsampling in inference on the CPU, some lines or images at a time."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch

from vitfast.engine import checks, donation, memo
from vitfast.engine import rows as by_rows
from vitfast.engine.products.linear import PreparedLinear, prepare_linear
from vitfast.ops.common import norm as norm_op
from vitfast.ops.patch_embed import native as patch_op
from vitfast.plans import Linear, Norm, Patches, PatchMerging
from vitfast.runtime import native
from vitfast.runtime.library import autocast_dtype


def merge(x: torch.Tensor, plan: PatchMerging) -> torch.Tensor | None:
    """2x2 patches of a map x [B, H, W, C] reduced; None where it is for the public ops."""
    return memo.call(_merge, _merge_steps, by_rows.count(x) // 4, x, plan)


class _Merging(NamedTuple):
    """Swin's downsampling ready to run, its products in dtype `operand`."""

    plan: PatchMerging
    operand: torch.dtype
    linear: PreparedLinear


def _merge_steps(
    x: torch.Tensor, plan: PatchMerging, autocast: torch.dtype | None
) -> _Merging | None:
    operand = autocast or x.dtype
    if not checks.dtypes_fit(x, autocast):
        return None
    shape = norm_op.merged_shape(x)
    weight, bias = plan.reduction
    dtypes = norm_op.DTYPES if autocast else (x.dtype,)
    width = len(weight) if plan.norm_last else shape[-1]
    if not (
        checks.tensor(weight, (len(weight), shape[-1]), dtypes)
        and checks.vector(bias, len(weight), dtypes)
        and checks.vector(plan.norm.weight, width)
        and checks.vector(plan.norm.bias, width)
    ):
        return None
    return _Merging(plan, operand, prepare_linear(plan.reduction, math.prod(shape[:3]), operand))


def _merge(steps: _Merging, x: torch.Tensor) -> torch.Tensor:
    plan, operand, reduction = steps
    shape = batch, high, wide, _ = norm_op.merged_shape(x)

    def patches(part: torch.Tensor) -> torch.Tensor:
        found = native.empty(norm_op.merged_shape(part), operand)
        if plan.norm_last:
            norm_op.forward(norm_op.NONE, part, residual_out=found, merge=True)
        else:
            norm_op.forward(
                norm_op.KINDS[plan.norm.kind], part, weight=plan.norm.weight, bias=plan.norm.bias,
                eps=plan.norm.eps, normed_out=found, merge=True,
            )  # fmt: skip
        y = reduction(found.view(-1, shape[-1]))
        return by_rows.normalise(y, plan.norm, y) if plan.norm_last else y

    if batch * high * wide <= by_rows.WHOLE_ROWS:
        return patches(x).view(batch, high, wide, -1)
    width = len(plan.reduction.weight)
    # A line of the result is written after two of x were read, and takes no more room.
    out = donation.result(x, (batch, high, wide, width), operand)
    step = max(1, by_rows.CHUNK_ROWS // wide)
    for image, result in zip(x, out, strict=True):
        for first in range(0, high, step):
            part = image[None, 2 * first : 2 * (first + step)]
            result[first : first + step] = patches(part).view(-1, wide, width)
    donation.release_rest(x, out)
    return out


def embed(
    image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: Norm
) -> torch.Tensor | None:
    """norm(tokens) [B, N, C] of an image's patches; None where it is for the public ops.

    Tokens are normalised while they are in the cache.
    """
    autocast = autocast_dtype(image.device)
    operand = autocast or image.dtype
    dtypes = norm_op.DTYPES if autocast else (image.dtype,)
    channels = len(weight)
    if not (
        checks.dtypes_fit(image, autocast)
        and image.shape[1] == weight.shape[1]
        and weight.dtype in dtypes
        and weight.is_cpu
        and checks.vector(bias, channels, dtypes)
        and checks.vector(norm.weight, channels)
        and checks.vector(norm.bias, channels)
    ):
        return None
    return patch_op.normed(image, weight, bias, operand, lambda x: by_rows.normalise(x, norm, x))


def downsample(x: torch.Tensor, plan: Patches) -> torch.Tensor | None:
    """Patches [B, N, C'] of norm(x), of a map [B, H, W, C]; None as of `embed`."""
    return memo.call(_downsample, _downsample_steps, by_rows.count(x), x, plan)


class _Downsampling(NamedTuple):
    """A norm and the convolution after it ready to run, its products in dtype `operand`."""

    plan: Patches
    operand: torch.dtype
    linear: PreparedLinear


def _downsample_steps(
    x: torch.Tensor, plan: Patches, autocast: torch.dtype | None
) -> _Downsampling | None:
    (weight, bias), norm = plan.projection, plan.norm
    operand = autocast or x.dtype
    dtypes = norm_op.DTYPES if autocast else (x.dtype,)
    batch, high, wide, channels = x.shape
    width, _, height, across = weight.shape
    if not (
        checks.dtypes_fit(x, autocast)
        and checks.tensor(weight, (width, channels, height, across), dtypes)
        and checks.vector(bias, width, dtypes)
        and checks.vector(norm.weight, channels)
        and checks.vector(norm.bias, channels)
    ):
        return None
    rows = batch * (high // height) * (wide // across)
    linear = prepare_linear(Linear(weight, bias), rows, operand, channels_last=True)
    return _Downsampling(plan, operand, linear)


def _downsample(steps: _Downsampling, x: torch.Tensor) -> torch.Tensor:
    plan, operand, linear = steps
    batch, high, wide, channels = x.shape
    width, _, height, across = plan.projection.weight.shape
    lines, columns = high // height, wide // across
    x = x.contiguous()
    # A line is written after its patches were read; if all fit into x, it fits into their lines.
    out = donation.result(x, (batch, lines, columns, width), operand)
    for images, stripes in by_rows.stripes(batch, lines, columns, by_rows.CHUNK_ROWS):
        for first, last in stripes:
            part = x[images, first * height : last * height]
            part = part.view(-1, height, columns, across, channels)
            rows = torch.empty(
                (len(part), columns, height, across, channels), dtype=operand, device="cpu"
            )
            for i, j in itertools.product(range(height), range(across)):
                by_rows.normalise(part[:, i, :, j], plan.norm, rows[:, :, i, j])
            result = out[images, first:last].view(-1, width)
            linear.into(rows.view(-1, height * across * channels), result)
    donation.release_rest(x, out)
    return out.view(batch, -1, width)
