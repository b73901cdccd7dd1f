"""How the layers read a norm module's weights, and apply them."""

from __future__ import annotations

from typing import Any

import torch
from timm import layers as timm_layers
from timm.layers.grn import GlobalResponseNorm
from torch import nn

from vitfast import ops
from vitfast.layers import _as_built, _guard
from vitfast.layers._guard import Children
from vitfast.plans import Grn, Norm, Unsupported

KINDS = {
    nn.LayerNorm: "layer",
    timm_layers.LayerNorm: "layer",
    timm_layers.RmsNorm: "rms",
}
"""The norms known by exact class; the drop-ins add themselves."""
KINDS_2D = {timm_layers.LayerNorm2d: "layer", timm_layers.RmsNorm2d: "rms"}
"""Those over the channels of NCHW."""
GRN: set[type[nn.Module]] = {GlobalResponseNorm}


def plan(module: Any) -> Norm:
    """What a norm module holds, its own hooks set aside (whoever called it has run them)."""
    return _plan(module, KINDS)


def plan_2d(module: Any) -> Norm:
    """As `plan`, of a norm over the channels of NCHW."""
    return _plan(module, KINDS_2D)


def _plan(module: Any, kinds: dict[type[nn.Module], str]) -> Norm:
    kind = kinds.get(type(module))
    if kind is None:
        raise Unsupported(f"norm {type(module).__name__} is not implemented")
    if getattr(module, "_fast_norm", False):
        raise Unsupported("fast norm was switched on when it was built")
    if len(module.normalized_shape) != 1:
        raise Unsupported(f"it normalises over {len(module.normalized_shape)} dimensions")
    weight = _guard.tensor(module, "weight")
    bias = _guard.tensor(module, "bias") if kind == "layer" else None
    if weight is not None:
        _as_built.expect(module, normalized_shape=tuple(weight.shape))
    return Norm(kind, weight, bias, module.eps, module.normalized_shape[0])


def plan_grn(module: Any) -> Grn:
    """What a GlobalResponseNorm holds."""
    if type(module) not in GRN:
        raise Unsupported(f"norm {type(module).__name__} is not implemented")
    if module.channel_dim == -1:
        _as_built.expect(module, spatial_dim=(1, 2), wb_shape=(1, 1, 1, -1))
    else:
        _as_built.expect(module, channel_dim=1, spatial_dim=(2, 3), wb_shape=(1, -1, 1, 1))
    return Grn(_guard.tensor(module, "weight"), _guard.tensor(module, "bias"), module.eps)


def grn_child(children: Children, name: str, channel_dim: int) -> Grn:
    """As `child`, of a GlobalResponseNorm over maps whose channels lie there (-1 or 1)."""
    _guard.check_bare(children[name], name)
    _as_built.expect(children[name], channel_dim=channel_dim)
    return plan_grn(children[name])


def child(children: Children, name: str) -> Norm:
    """What a child holds that must be a LayerNorm or RmsNorm."""
    module = children[name]
    _guard.check_bare(module, name)
    return plan(module)


def child_2d(children: Children, name: str) -> Norm:
    """As `child`, of a LayerNorm2d or RmsNorm2d."""
    module = children[name]
    _guard.check_bare(module, name)
    return plan_2d(module)


def optional_child(children: Children, name: str) -> Norm | None:
    """As `child`, or None for an nn.Identity or no module at all."""
    module = children.get(name)
    if module is None:
        return None
    if type(module) is nn.Identity:
        _guard.check_bare(module, name)
        return None
    return child(children, name)


def dtype_2d(dtype: torch.dtype, norm: Norm) -> torch.dtype | None:
    """That of a RmsNorm2d's result, of an input of this dtype: timm multiplies in plain torch."""
    if norm.kind != "rms" or norm.weight is None:
        return None
    return torch.promote_types(dtype, norm.weight.dtype)


def apply(x: torch.Tensor, norm: Norm, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """x [..., C] normalised, by the differentiable ops."""
    if norm.kind == "rms":
        return ops.rms_norm(x, norm.weight, norm.eps, out_dtype=out_dtype)
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps, out_dtype=out_dtype)
