"""How the layers read a norm module's weights, and apply them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm import layers as timm_layers
from timm.layers.grn import GlobalResponseNorm
from torch import nn

from vitfast import ops
from vitfast.layers import _guard
from vitfast.layers._guard import Children, Unsupported

KINDS = {
    nn.LayerNorm: "layer",
    timm_layers.LayerNorm: "layer",
    timm_layers.RmsNorm: "rms",
}
"""The norms known by exact class; the drop-ins add themselves."""
KINDS_2D = {timm_layers.LayerNorm2d: "layer", timm_layers.RmsNorm2d: "rms"}
"""Those over the channels of NCHW."""
GRN: set[type[nn.Module]] = {GlobalResponseNorm}


class Norm(NamedTuple):
    """kind "layer" or "rms"; weight and bias [C] or None."""

    kind: str
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float


class Grn(NamedTuple):
    """The weight and bias [C] of a global response norm."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


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
    bias = _guard.tensor(module, "bias") if kind == "layer" else None
    return Norm(kind, _guard.tensor(module, "weight"), bias, module.eps)


def plan_grn(module: Any) -> Grn:
    """What a GlobalResponseNorm holds."""
    if type(module) not in GRN:
        raise Unsupported(f"norm {type(module).__name__} is not implemented")
    return Grn(_guard.tensor(module, "weight"), _guard.tensor(module, "bias"), module.eps)


def grn_child(children: Children, name: str) -> Grn:
    """As `child`, of a GlobalResponseNorm."""
    _guard.check_bare(children[name], name)
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
