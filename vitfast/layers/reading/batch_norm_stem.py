"""Convolutional stems with BatchNorm in CPU inference: the norm folded into packed convolutions.

timm's ResNet (as in its ResNet-D hybrids) and MobileCLIP's stem, module by module: a convolution
takes the BatchNorm and the activation after it along, a bottleneck its residual, too. Any other
module between them is called as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm import layers as timm_layers
from timm.models import _features, resnet
from timm.models import vision_transformer_hybrid as hybrid
from torch import nn

from vitfast.layers.reading.children import (
    ACTIVATIONS,
    check_bare,
    check_readable,
    read_activation,
    read_drop_path,
    read_parameter,
)
from vitfast.layers.reading.conv import plan_conv
from vitfast.plans import BatchNorm, BatchNormBottleneck, Conv, StemStep, Unfit

_CHAINS = {nn.Sequential, _features.FeatureListNet, hybrid.ConvStem, timm_layers.ConvNormAct}
_NORMS = {nn.BatchNorm2d, timm_layers.BatchNormAct2d}
_ACTS = ("none", "relu", "gelu")


def _flat(module: Any) -> Iterator[Any]:
    """The modules that a chain runs one after another."""
    check_bare(module, type(module).__name__)
    if type(module) in _CHAINS:
        for child in module._modules.values():
            yield from _flat(child)
    elif type(module) is not nn.Identity:
        yield module


def _steps(modules: list[Any]) -> Iterator[StemStep]:
    rest = modules
    while rest:
        if type(rest[0]) is nn.Conv2d:
            conv, taken = _folded(rest)
            rest = rest[taken:]
            yield conv
            continue
        module, rest = rest[0], rest[1:]
        if module.training:  # it might draw or count, and do so again where the steps are given up
            raise Unfit("it is training")
        yield _bottleneck(module) if type(module) is resnet.Bottleneck else module


def _folded(modules: list[Any]) -> tuple[Conv, int]:
    """The convolution that comes first with what follows it, and how many modules these are."""
    norm, act, taken = None, "none", 1
    if len(modules) > taken and type(modules[taken]) in _NORMS:
        module = modules[taken]
        norm, taken = _norm(module), taken + 1
        if type(module) is timm_layers.BatchNormAct2d:
            if type(module.drop) is not nn.Identity:
                raise Unfit("its norm drops")
            check_bare(module.drop, "drop")
            act = read_activation(module._modules, "act")
    if act == "none" and len(modules) > taken and type(modules[taken]) in ACTIVATIONS:
        act, taken = read_activation({"act": modules[taken]}, "act"), taken + 1
    if act not in _ACTS:
        raise Unfit(f"activation {act} is not implemented here")
    return plan_conv(modules[0])._replace(norm=norm, act=act), taken


def _norm(module: Any) -> BatchNorm:
    buffers = module._buffers
    mean, var = buffers.get("running_mean"), buffers.get("running_var")
    if module.training or mean is None or var is None:
        raise Unfit("its norm uses the statistics of the batch")
    for t in (mean, var):
        check_readable(t, "a statistic of its norm")
    weight, bias = read_parameter(module, "weight"), read_parameter(module, "bias")
    return BatchNorm(weight, bias, mean, var, module.eps)


def _bottleneck(module: Any) -> BatchNormBottleneck:
    children = module._modules
    others = (children.get(name) for name in ("se", "drop_block", "aa"))
    if [part for child in others if child is not None for part in _flat(child)]:
        raise Unfit("its bottlenecks gate, drop or blur")
    if children.get("drop_path") is not None and read_drop_path(children, "drop_path"):
        raise Unfit("its bottlenecks drop paths")
    convs = []
    for i in (1, 2, 3):
        parts = [children[f"conv{i}"], children[f"bn{i}"], *([children[f"act{i}"]] * (i < 3))]
        flat = [part for child in parts for part in _flat(child)]
        conv, taken = _folded(flat)
        if taken != len(flat) or type(children[f"bn{i}"]) is not nn.BatchNorm2d:
            raise Unfit("its bottlenecks are of another kind")
        convs.append(conv)
    if read_activation(children, "act3") != "relu":
        raise Unfit("its bottlenecks end in another activation than ReLU")
    before, shortcut = (), None
    if children.get("downsample") is not None:
        steps = list(_steps(list(_flat(children["downsample"]))))
        if not steps or type(steps[-1]) is not Conv or BatchNormBottleneck in map(type, steps):
            raise Unfit("its shortcuts do not end in a convolution")
        *before, shortcut = steps
    return BatchNormBottleneck(tuple(convs), tuple(before), shortcut)  # type: ignore[arg-type]
