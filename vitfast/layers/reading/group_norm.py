"""How the layers read a GroupNorm's weights."""

from __future__ import annotations

from typing import Any

from timm import layers as timm_layers
from torch import nn

from vitfast.layers.reading.children import (
    Children,
    check_bare,
    read_activation,
    read_parameter,
    timm_class,
)
from vitfast.plans import GroupNorm, Unfit, Unsupported

_GROUP_NORMS = {timm_layers.GroupNormAct, timm_layers.GroupNorm1Act}


def plan_group_norm(module: Any) -> GroupNorm:
    """What a GroupNormAct holds, its own hooks set aside (whoever called it has run them)."""
    if timm_class(module) not in _GROUP_NORMS:
        raise Unsupported(f"norm {type(module).__name__} is not implemented")
    if module._fast_norm:
        raise Unsupported("fast norm was switched on when it was built")
    children = module._modules
    drop = children["drop"]
    if type(drop) is not nn.Identity:
        raise Unsupported(f"it drops, by a {type(drop).__name__}")
    check_bare(drop, "drop")
    return GroupNorm(
        module.num_groups,
        read_parameter(module, "weight"),
        read_parameter(module, "bias"),
        module.eps,
        read_norm_activation(children, "act"),
    )


def read_norm_activation(children: Children, name: str) -> str:
    """The name of an activation that the op has."""
    act = read_activation(children, name)
    if act not in ("none", "relu"):
        raise Unsupported(f"activation {act} is not implemented here")
    return act


def read_group_norm(children: Children, name: str, act: str | None = None) -> GroupNorm:
    """What a child holds that must be a GroupNormAct, of this activation if given."""
    module = children[name]
    check_bare(module, name)
    found = plan_group_norm(module)
    if act is not None and found.act != act:
        raise Unfit(f"{name} has activation {found.act}, not {act}")
    return found
