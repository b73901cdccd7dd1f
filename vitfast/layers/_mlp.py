"""How the MLP layers read their weights, and the one computation behind all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from vitfast import ops
from vitfast.layers import _guard, _norm
from vitfast.layers._guard import Children, Linear, Unsupported
from vitfast.layers._norm import Grn, Norm
from vitfast.ops._normed import Normed


class Mlp(NamedTuple):
    """What an MLP module holds: fc2(norm(h)), with h one of

    act(fc1(x)); gate None
    act(gate(x)) * fc1(x); two projections (SwiGLU)
    act(first half) * second half of fc1(x), or the halves the other way round (GluMlp)
    """

    fc1: Linear
    act: str
    fc2: Linear
    norm: Norm | None
    gate: Linear | None = None
    packed: str | None = None  # which half of a packed fc1 goes through act: "first" or "last"
    grn: Grn | None = None  # instead of the norm


PLANS: dict[type[nn.Module], Callable[[nn.Module], Mlp]] = {}
"""The plan function of each MLP class, timm's and the drop-in."""
POINTWISE: dict[type[nn.Module], Callable[[nn.Module], Mlp]] = {}
"""Those whose linear layers may be 1x1 convolutions."""


def child(children: Children, name: str) -> Mlp:
    """What a child holds that must be a known MLP."""
    module = children[name]
    plan = PLANS.get(type(module))
    if plan is None:
        raise Unsupported(f"MLP {type(module).__name__} is not implemented")
    _guard.check_bare(module, name)
    return plan(module)


def pointwise(children: Children, name: str) -> Mlp:
    """As `child`, channels last: the linear layers of the MLP may be 1x1 convolutions."""
    module = children[name]
    plan = POINTWISE.get(type(module))
    if plan is None:
        raise Unsupported(f"MLP {type(module).__name__} is not implemented")
    _guard.check_bare(module, name)
    return plan(module)


def common(module: nn.Module, fc1: str, *, pointwise: bool = False, act: str | None = None) -> Mlp:
    """The parts that all MLPs have alike.

    Args:
        pointwise: 1x1 convolutions are linear layers, too.
        act: instead of the module's, which the caller has looked at.
    """
    children = module._modules
    if not pointwise and type(children[fc1]) is nn.Conv2d:
        raise Unsupported("linear layers as convolutions over NCHW are not implemented")
    act = act or _guard.activation(children, "act")
    _guard.check_no_dropout(children, "drop1")
    _guard.check_no_dropout(children, "drop2")
    plan = Mlp(
        fc1=_guard.linear(children, fc1, pointwise=pointwise),
        act=act,
        fc2=_guard.linear(children, "fc2", pointwise=pointwise),
        norm=_norm.optional_child(children, "norm"),
    )
    if plan.norm is not None:
        plan.norm.check_width(plan.fc2.weight.shape[1])
    return plan


def apply(x: torch.Tensor, plan: Mlp, normed: Normed | None = None) -> torch.Tensor:
    """What timm's forward computes for x [..., C], by the differentiable ops.

    Args:
        normed: how x came from the residual stream, which then is all that is saved.
    """
    if plan.norm is None and plan.gate is None:
        return ops.mlp(
            x, *plan.fc1, *plan.fc2, plan.act, gate=plan.packed, normed=normed, grn=plan.grn
        )
    gate_weight, gate_bias = plan.gate or (None, None)
    hidden = ops.linear_act(
        x,
        *plan.fc1,
        plan.act,
        gate=plan.packed,
        gate_weight=gate_weight,
        gate_bias=gate_bias,
    )
    if plan.norm is not None:
        hidden = _norm.apply(hidden, plan.norm)
    return ops.linear_act(hidden, *plan.fc2)
