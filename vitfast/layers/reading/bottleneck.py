"""Plans of the bottlenecks of timm's ResNetV2."""

from __future__ import annotations

from typing import Any

from timm.models import resnetv2
from torch import nn

from vitfast.layers.reading.children import check_bare, read_activation, read_drop_path
from vitfast.layers.reading.conv import read_std_conv
from vitfast.layers.reading.group_norm import read_group_norm
from vitfast.plans import Bottleneck, ConvNorm, PreActBottleneck, Unfit, Unsupported


def plan_bottleneck(module: Any) -> Bottleneck:
    """What a `Bottleneck` holds: norms after the convolutions, ReLU after the residual add."""
    children = module._modules
    acts = ("relu", "relu", "none")
    steps = tuple(
        (read_std_conv(children, f"conv{i}"), read_group_norm(children, f"norm{i}", act))
        for i, act in zip((1, 2, 3), acts, strict=True)
    )
    if read_activation(children, "act3") != "relu":
        raise Unsupported("its activation is not ReLU")
    downsample = children.get("downsample")
    return Bottleneck(
        steps,  # type: ignore[arg-type]
        _shortcut(downsample),
        downsample,
        read_drop_path(children, "drop_path"),
    )


def _shortcut(downsample: nn.Module | None) -> ConvNorm | None:
    if type(downsample) is not resnetv2.DownsampleConv:
        return None
    try:
        check_bare(downsample, "downsample")
        children = downsample._modules
        return read_std_conv(children, "conv"), read_group_norm(children, "norm", "none")
    except Unfit:
        return None


def plan_preact_bottleneck(module: Any) -> PreActBottleneck:
    """What a `PreActBottleneck` holds."""
    children = module._modules
    steps = tuple(
        (read_std_conv(children, f"conv{i}"), read_group_norm(children, f"norm{i}"))
        for i in (1, 2, 3)
    )
    drop_path = read_drop_path(children, "drop_path")
    return PreActBottleneck(steps, children.get("downsample"), drop_path)  # type: ignore[arg-type]
