"""The forward of timm's ResNetV2 bottlenecks, by the engine or the ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vitfast.blocks.parts import apply_conv, apply_group_norm, drop_scale
from vitfast.engine import resnet as engine
from vitfast.plans import (
    Bottleneck,
    DropRate,
    PreActBottleneck,
)


def run_bottleneck(x: torch.Tensor, plan: Bottleneck) -> torch.Tensor:
    """x [B, C, H, W] through the bottleneck."""
    found = engine.bottleneck(x, plan)
    if found is not None:
        return found
    shortcut = x
    if plan.shortcut is not None:
        shortcut = apply_group_norm(apply_conv(x, plan.shortcut[0]), plan.shortcut[1])
    elif plan.downsample is not None:
        shortcut = plan.downsample(x)
    for conv, norm in plan.steps[:2]:
        x = apply_group_norm(apply_conv(x, conv), norm)
    conv, norm = plan.steps[2]
    x = apply_conv(x, conv)
    if plan.drop_path is None and x.shape == shortcut.shape:
        return apply_group_norm(x, norm, shortcut, "relu")
    x = apply_group_norm(x, norm)
    return F.relu(dropped(x, plan.drop_path) + shortcut)


def dropped(x: torch.Tensor, rate: DropRate | None) -> torch.Tensor:
    """timm's drop_path on maps [B, C, H, W]."""
    scale = drop_scale(x, None, rate)
    return x if scale is None else x * scale[:, None, None, None]


def run_preact_bottleneck(x: torch.Tensor, plan: PreActBottleneck) -> torch.Tensor:
    """x [B, C, H, W] through the bottleneck."""
    shortcut = x
    for i, (conv, norm) in enumerate(plan.steps):
        x = apply_group_norm(x, norm)
        if i == 0 and plan.downsample is not None:
            shortcut = plan.downsample(x)
        x = apply_conv(x, conv)
    return dropped(x, plan.drop_path) + shortcut
