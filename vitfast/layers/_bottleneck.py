"""What a bottleneck of timm's ResNetV2 holds, and its forward, by ops and direct."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import resnetv2
from torch import nn

from vitfast.engine import resnet as engine
from vitfast.layers import _block, _conv, _group_norm, _guard
from vitfast.plans import (
    Bottleneck,
    ConvNorm,
    DropRate,
    PreActBottleneck,
    Unfit,
    Unsupported,
)


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
    found = engine.bottleneck(x, plan)
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
