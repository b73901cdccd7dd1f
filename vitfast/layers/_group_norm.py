"""How the layers read a GroupNorm's weights, and apply them."""

from __future__ import annotations

from typing import Any

import torch
from timm import layers as timm_layers
from torch import nn

from vitfast import ops
from vitfast.layers import _guard
from vitfast.layers._guard import Children
from vitfast.plans import GroupNorm, Unfit, Unsupported

KINDS: set[type] = {timm_layers.GroupNormAct, timm_layers.GroupNorm1Act}
"""The norms known by exact class; the drop-ins add themselves."""


def plan(module: Any) -> GroupNorm:
    """What a GroupNormAct holds, its own hooks set aside (whoever called it has run them)."""
    if type(module) not in KINDS:
        raise Unsupported(f"norm {type(module).__name__} is not implemented")
    if module._fast_norm:
        raise Unsupported("fast norm was switched on when it was built")
    children = module._modules
    drop = children["drop"]
    if type(drop) is not nn.Identity:
        raise Unsupported(f"it drops, by a {type(drop).__name__}")
    _guard.check_bare(drop, "drop")
    return GroupNorm(
        module.num_groups,
        _guard.tensor(module, "weight"),
        _guard.tensor(module, "bias"),
        module.eps,
        activation(children, "act"),
    )


def activation(children: Children, name: str) -> str:
    """The name of an activation that the op has."""
    act = _guard.activation(children, name)
    if act not in ("none", "relu"):
        raise Unsupported(f"activation {act} is not implemented here")
    return act


def child(children: Children, name: str, act: str | None = None) -> GroupNorm:
    """What a child holds that must be a GroupNormAct, of this activation if given."""
    module = children[name]
    _guard.check_bare(module, name)
    found = plan(module)
    if act is not None and found.act != act:
        raise Unfit(f"{name} has activation {found.act}, not {act}")
    return found


def apply(
    x: torch.Tensor, norm: GroupNorm, residual: torch.Tensor | None = None, act: str | None = None
) -> torch.Tensor:
    """A map x [B, C, H, W] by the differentiable op; `act` instead of the norm's own."""
    return ops.group_norm_act(
        x, norm.groups, norm.weight, norm.bias, norm.eps, residual=residual, act=act or norm.act
    )
