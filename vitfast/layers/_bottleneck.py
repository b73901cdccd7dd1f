"""What a bottleneck of timm's ResNetV2 holds, and its forward, by ops and direct."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import resnetv2
from torch import nn

from vitfast.layers import _block, _conv, _fits, _group_norm, _guard, _memo
from vitfast.layers._conv import Call
from vitfast.ops._onednn_conv import Ready
from vitfast.ops.common import norm as norm_op
from vitfast.ops.group_norm_act import native as group_norm_op
from vitfast.plans import (
    Bottleneck,
    Conv,
    ConvNorm,
    DropRate,
    GroupNorm,
    Pads,
    PreActBottleneck,
    Unfit,
    Unsupported,
)
from vitfast.runtime import native


def plan(module: Any) -> Bottleneck:
    """What a `Bottleneck` holds: norms after the convolutions, ReLU after the residual add."""
    children = module._modules
    acts = ("relu", "relu", "none")
    steps = tuple(
        (_conv.child(children, f"conv{i}"), _group_norm.child(children, f"norm{i}", act))
        for i, act in zip((1, 2, 3), acts, strict=True)
    )
    if _guard.activation(children, "act3") != "relu":
        raise Unsupported("its activation is not ReLU")
    downsample = children.get("downsample")
    return Bottleneck(
        steps,  # type: ignore[arg-type]
        _shortcut(downsample),
        downsample,
        _guard.drop_path(children, "drop_path"),
    )


def _shortcut(downsample: nn.Module | None) -> ConvNorm | None:
    if type(downsample) is not resnetv2.DownsampleConv:
        return None
    try:
        _guard.check_bare(downsample, "downsample")
        children = downsample._modules
        return _conv.child(children, "conv"), _group_norm.child(children, "norm", "none")
    except Unfit:
        return None


def apply(x: torch.Tensor, plan: Bottleneck) -> torch.Tensor:
    """x [B, C, H, W] through the bottleneck."""
    found = _direct(x, plan)
    if found is not None:
        return found
    shortcut = x
    if plan.shortcut is not None:
        shortcut = _group_norm.apply(_conv.apply(x, plan.shortcut[0]), plan.shortcut[1])
    elif plan.downsample is not None:
        shortcut = plan.downsample(x)
    for conv, norm in plan.steps[:2]:
        x = _group_norm.apply(_conv.apply(x, conv), norm)
    conv, norm = plan.steps[2]
    x = _conv.apply(x, conv)
    if plan.drop_path is None and x.shape == shortcut.shape:
        return _group_norm.apply(x, norm, shortcut, "relu")
    x = _group_norm.apply(x, norm)
    return F.relu(dropped(x, plan.drop_path) + shortcut)


def dropped(x: torch.Tensor, rate: DropRate | None) -> torch.Tensor:
    """timm's drop_path on maps [B, C, H, W]."""
    scale = _block.drop_scale(x, None, rate)
    return x if scale is None else x * scale[:, None, None, None]


def _direct(x: torch.Tensor, plan: Bottleneck) -> torch.Tensor | None:
    """In inference on the CPU: packed convolutions, each norm in place or where padding wants it.

    None where it takes the public ops to compute or to complain.
    """
    if plan.drop_path is not None or (plan.shortcut is None and plan.downsample is not None):
        return None
    if x.ndim != 4 or x.numel() == 0 or not _conv.channels_last(x):
        return None
    call = _conv.direct(x)
    if call is None or x.dtype not in norm_op.DTYPES:
        return None
    ready = _memo.recall(_ready, 0, x, plan, call)
    if ready is None:
        return None
    (first, norm1), (second, norm2), (third, norm3) = zip(
        ready, (norm for _, norm in plan.steps), strict=False
    )
    lower = x.to(call.dtype)
    shortcut = x
    if plan.shortcut is not None:
        shortcut = normalise(ready[3](lower), plan.shortcut[1])
    y = first(lower)
    room = second.room(*y.shape[2:])
    y = second(normalise(y, norm1, room), padded=room is not None)
    y = third(normalise(y, norm2))
    if shortcut.shape != y.shape:
        return None
    return normalise(y, norm3, residual=shortcut, act="relu")


def _ready(
    x: torch.Tensor, plan: Bottleneck, _lower: torch.dtype | None, call: Call
) -> list[Ready] | None:
    """The three convolutions, and the shortcut's if there is one."""
    ready: list[Ready] = []
    channels = x.shape[1]
    for conv, norm in plan.steps:
        found = fitting(call, conv, norm, channels)
        if found is None:
            return None
        ready.append(found)
        channels = conv.weight.shape[0]
    if plan.shortcut is not None:
        found = fitting(call, *plan.shortcut, x.shape[1])
        if found is None or plan.shortcut[0].weight.shape[0] != channels:
            return None
        ready.append(found)
    elif channels != x.shape[1]:
        return None
    return ready


def fitting(call: Call, conv: Conv, norm: GroupNorm, channels: int) -> Ready | None:
    """The convolution, where the norm after it is one for `normalise`, too."""
    ready = _conv.ready(call, conv, channels)
    size = conv.weight.shape[0]
    if (
        (call.records and _guard.records_grad(norm.weight, norm.bias))
        or size % norm.groups
        or not (_fits.vector(norm.weight, size) and _fits.vector(norm.bias, size))
    ):
        return None
    return ready


def normalise(
    y: torch.Tensor,
    norm: GroupNorm,
    room: Pads | None = None,
    residual: torch.Tensor | None = None,
    act: str | None = None,
) -> torch.Tensor:
    """A convolution's fresh result normalised: over itself, unless a residual widens it.

    Args:
        room: (left, right, top, bottom), zeros around the result.
    """
    out = y
    whole = y
    b, c, h, w = y.shape
    if residual is not None:
        residual = group_norm_op.dense(residual, True)
        dtype = group_norm_op.result_dtype(y, residual)
        if dtype != y.dtype:
            out = whole = native.empty((b, h, w, c), dtype).permute(0, 3, 1, 2)
    if room is not None:
        left, right, top, bottom = room
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


def plan_preact(module: Any) -> PreActBottleneck:
    """What a `PreActBottleneck` holds."""
    children = module._modules
    steps = tuple(
        (_conv.child(children, f"conv{i}"), _group_norm.child(children, f"norm{i}"))
        for i in (1, 2, 3)
    )
    drop_path = _guard.drop_path(children, "drop_path")
    return PreActBottleneck(steps, children.get("downsample"), drop_path)  # type: ignore[arg-type]


def apply_preact(x: torch.Tensor, plan: PreActBottleneck) -> torch.Tensor:
    """x [B, C, H, W] through the bottleneck."""
    shortcut = x
    for i, (conv, norm) in enumerate(plan.steps):
        x = _group_norm.apply(x, norm)
        if i == 0 and plan.downsample is not None:
            shortcut = plan.downsample(x)
        x = _conv.apply(x, conv)
    return dropped(x, plan.drop_path) + shortcut
