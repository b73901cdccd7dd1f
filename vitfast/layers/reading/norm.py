"""How the layers read a norm module's weights."""

from __future__ import annotations

from typing import Any

from timm import layers as timm_layers
from timm.layers.grn import GlobalResponseNorm
from timm.models import metaformer
from torch import nn

from vitfast.layers.reading.as_built import expect_attributes
from vitfast.layers.reading.children import Children, check_bare, read_parameter, timm_class
from vitfast.plans import Grn, Norm, Unsupported

_NORMS = {
    nn.LayerNorm: "layer",
    timm_layers.LayerNorm: "layer",
    metaformer.LayerNormNoBias: "layer",
    timm_layers.RmsNorm: "rms",
}
_NORMS_2D = {
    timm_layers.LayerNorm2d: "layer",
    metaformer.LayerNorm2dNoBias: "layer",
    timm_layers.RmsNorm2d: "rms",
}
"""Those over the channels of NCHW."""


def plan_norm(module: Any) -> Norm:
    """What a norm module holds, its own hooks set aside (whoever called it has run them)."""
    return _plan(module, _NORMS)


def plan_norm_2d(module: Any) -> Norm:
    """What a norm over the channels of NCHW holds, its own hooks set aside as in `plan_norm`."""
    return _plan(module, _NORMS_2D)


def _plan(module: Any, kinds: dict[type[nn.Module], str]) -> Norm:
    kind = kinds.get(timm_class(module))
    if kind is None:
        raise Unsupported(f"norm {type(module).__name__} is not implemented")
    if getattr(module, "_fast_norm", False):
        raise Unsupported("fast norm was switched on when it was built")
    if len(module.normalized_shape) != 1:
        raise Unsupported(f"it normalises over {len(module.normalized_shape)} dimensions")
    weight = read_parameter(module, "weight")
    bias = read_parameter(module, "bias") if kind == "layer" else None
    if weight is not None:
        expect_attributes(module, normalized_shape=tuple(weight.shape))
    return Norm(kind, weight, bias, module.eps, module.normalized_shape[0])


def plan_grn(module: Any) -> Grn:
    """What a GlobalResponseNorm holds."""
    if timm_class(module) is not GlobalResponseNorm:
        raise Unsupported(f"norm {type(module).__name__} is not implemented")
    if module.channel_dim == -1:
        expect_attributes(module, spatial_dim=(1, 2), wb_shape=(1, 1, 1, -1))
    else:
        expect_attributes(module, channel_dim=1, spatial_dim=(2, 3), wb_shape=(1, -1, 1, 1))
    return Grn(read_parameter(module, "weight"), read_parameter(module, "bias"), module.eps)


def read_grn(children: Children, name: str, channel_dim: int) -> Grn:
    """What a child holds that must be a GlobalResponseNorm with this channel axis (-1 or 1)."""
    check_bare(children[name], name)
    expect_attributes(children[name], channel_dim=channel_dim)
    return plan_grn(children[name])


def read_norm(children: Children, name: str) -> Norm:
    """What a child holds that must be a LayerNorm or RmsNorm."""
    module = children[name]
    check_bare(module, name)
    return plan_norm(module)


def read_norm_2d(children: Children, name: str) -> Norm:
    """What a child holds that must be a LayerNorm2d or RmsNorm2d."""
    module = children[name]
    check_bare(module, name)
    return plan_norm_2d(module)


def read_optional_norm(children: Children, name: str) -> Norm | None:
    """As `read_norm`, or None for an nn.Identity or no module at all."""
    module = children.get(name)
    if module is None:
        return None
    if type(module) is nn.Identity:
        check_bare(module, name)
        return None
    return read_norm(children, name)
