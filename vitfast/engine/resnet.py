"""Bottlenecks of timm's ResNetV2 and of stems with BatchNorm in inference on the CPU."""

from __future__ import annotations

import torch

from vitfast.engine import checks, memo
from vitfast.engine.eligibility import records_grad
from vitfast.engine.products import conv as conv_product
from vitfast.engine.products.conv import MapKind, Ready
from vitfast.ops.common import norm as norm_op
from vitfast.ops.group_norm_act import native as group_norm_op
from vitfast.plans import BatchNormBottleneck, Bottleneck, Conv, GroupNorm, Pads, StemStep, Unfit
from vitfast.runtime import native


def run_step(x: torch.Tensor, step: StemStep, kind: MapKind) -> torch.Tensor:
    if isinstance(step, Conv):
        return _prepare_step(x, step, kind)(x.to(kind.dtype))
    if not isinstance(step, BatchNormBottleneck):
        return step(x)
    y = shortcut = x.to(kind.dtype)
    if step.shortcut is not None:
        for module in step.before:
            shortcut = run_step(shortcut, module, kind)
        shortcut = run_step(shortcut, step.shortcut, kind)
    for conv in step.convs[:2]:
        y = run_step(y, conv, kind)
    ready = _prepare_step(y, step.convs[2], kind, adds=True)
    if shortcut.shape != (len(y), len(step.convs[2].weight), *y.shape[2:]):
        raise Unfit("its shortcut has another shape")
    return ready.add_relu(y, shortcut)


def _prepare_step(x: torch.Tensor, conv: Conv, kind: MapKind, adds: bool = False) -> Ready:
    """The convolution, packed for maps like x."""
    norm = conv.norm
    if records_grad(norm):
        raise Unfit("autograd records its norm")
    ready = None
    if x.ndim == 4 and conv_product.covers(x, conv):
        pixels = x.numel() // x.shape[1]
        ready = conv_product.prepare_fitting(kind._replace(pixels=pixels), conv, x.shape[1], adds)
    if ready is None:
        raise Unfit("a convolution is for PyTorch")
    return ready


def bottleneck(x: torch.Tensor, plan: Bottleneck) -> torch.Tensor | None:
    """In inference on the CPU: packed convolutions, each norm in place or where padding wants it.

    None where it takes the public ops to compute or to complain.
    """
    if plan.drop_path is not None or (plan.shortcut is None and plan.downsample is not None):
        return None
    if x.ndim != 4 or x.numel() == 0 or not conv_product.channels_last(x):
        return None
    kind = conv_product.direct(x)
    if kind is None or x.dtype not in norm_op.DTYPES:
        return None
    ready = memo.recall(_prepare, 0, x, plan, kind)
    if ready is None:
        return None
    (first, norm1), (second, norm2), (third, norm3) = zip(
        ready, (norm for _, norm in plan.steps), strict=False
    )
    rounded = x.to(kind.dtype)
    shortcut = x
    if plan.shortcut is not None:
        shortcut = normalise(ready[3](rounded), plan.shortcut[1])
    y = first(rounded)
    padding = second.padding(*y.shape[2:])
    y = second(normalise(y, norm1, padding), padded=padding is not None)
    y = third(normalise(y, norm2))
    if shortcut.shape != y.shape:
        return None
    return normalise(y, norm3, residual=shortcut, act="relu")


def _prepare(
    x: torch.Tensor, plan: Bottleneck, _autocast: torch.dtype | None, kind: MapKind
) -> list[Ready] | None:
    """The three convolutions, and the shortcut's if there is one."""
    ready: list[Ready] = []
    channels = x.shape[1]
    for conv, norm in plan.steps:
        found = fitting(kind, conv, norm, channels)
        if found is None:
            return None
        ready.append(found)
        channels = conv.weight.shape[0]
    if plan.shortcut is not None:
        found = fitting(kind, *plan.shortcut, x.shape[1])
        if found is None or plan.shortcut[0].weight.shape[0] != channels:
            return None
        ready.append(found)
    elif channels != x.shape[1]:
        return None
    return ready


def fitting(kind: MapKind, conv: Conv, norm: GroupNorm, channels: int) -> Ready | None:
    """The convolution, where the norm after it is one for `normalise`, too."""
    ready = conv_product.prepare_fitting(kind, conv, channels)
    size = conv.weight.shape[0]
    if (
        records_grad(norm)
        or size % norm.groups
        or not (checks.vector(norm.weight, size) and checks.vector(norm.bias, size))
    ):
        return None
    return ready


def normalise(
    y: torch.Tensor,
    norm: GroupNorm,
    padding: Pads | None = None,
    residual: torch.Tensor | None = None,
    act: str | None = None,
) -> torch.Tensor:
    """A convolution's fresh result normalised: over itself, unless a residual widens it.

    Args:
        padding: (left, right, top, bottom), zeros around the result.
    """
    out = y
    whole = y
    b, c, h, w = y.shape
    if residual is not None:
        residual = group_norm_op.dense(residual, True)
        dtype = group_norm_op.result_dtype(y, residual)
        if dtype != y.dtype:
            out = whole = native.empty((b, h, w, c), dtype).permute(0, 3, 1, 2)
    if padding is not None:
        left, right, top, bottom = padding
        whole = native.empty((b, h + top + bottom, w + left + right, c), y.dtype)
        whole = whole.permute(0, 3, 1, 2)
        for dim, before, after in ((2, top, bottom), (3, left, right)):
            size = whole.shape[dim]
            for start, length in ((0, before), (size - after, after)):
                if length:
                    whole.narrow(dim, start, length).zero_()
        out = whole[:, :, top : top + h, left : left + w]
    group_norm_op.run(
        y,
        norm.groups,
        norm_op.vector(norm.weight),
        norm_op.vector(norm.bias),
        norm.eps,
        residual,
        (act or norm.act) == "relu",
        out,
    )
    return whole
