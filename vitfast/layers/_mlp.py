"""How the MLP layers read their weights, and the one computation behind all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from vitfast import ops
from vitfast.layers import _guard, _norm
from vitfast.layers._attention import project
from vitfast.layers._guard import Children
from vitfast.ops.common.recompute import Normed
from vitfast.plans import Called, Mlp, Unfit, Unsupported

PLANS: dict[type[nn.Module], Callable[[nn.Module], Mlp]] = {}
"""The plan function of each MLP class, timm's and the drop-in."""
POINTWISE: dict[type[nn.Module], Callable[[nn.Module], Mlp]] = {}
"""Those whose linear layers may be 1x1 convolutions."""


def child(children: Children, name: str) -> Mlp:
    """What a child holds that must be a known MLP, all of whose weights are read."""
    module = children[name]
    plan = PLANS.get(type(module))
    if plan is None:
        raise Unsupported(f"MLP {type(module).__name__} is not implemented")
    _guard.check_bare(module, name)
    return read(plan(module))


def read(plan: Mlp) -> Mlp:
    """The plan, all of whose weights are read.

    Raises:
        Unfit: one of its linear layers has to be called.
    """
    _guard.check_read(plan.fc1, plan.gate, plan.fc2)
    return plan


def pointwise(children: Children, name: str) -> Mlp:
    """As `child`, channels last: the linear layers of the MLP may be 1x1 convolutions."""
    module = children[name]
    plan = POINTWISE.get(type(module))
    if plan is None:
        raise Unfit(f"{name} is a {type(module).__name__}, no MLP that vitfast knows")
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
    # A convolution is called on NCHW, which is not what there is.
    layer = partial(_guard.linear, pointwise=True) if pointwise else _guard.layer
    plan = Mlp(
        fc1=layer(children, fc1),
        act=act,
        fc2=layer(children, "fc2"),
        norm=_norm.optional_child(children, "norm"),
    )
    if plan.norm is not None and not isinstance(plan.fc2, Called):
        plan.norm.check_width(plan.fc2.weight.shape[1])
    return with_act(plan, module)


def with_act(plan: Mlp, module: nn.Module) -> Mlp:
    """The plan with the activation to call, where a projection before it is called."""
    if isinstance(plan.fc1, Called) or isinstance(plan.gate, Called):
        return plan._replace(act_module=module._modules["act"])
    return plan


def apply(x: torch.Tensor, plan: Mlp, normed: Normed | None = None) -> torch.Tensor:
    """What timm's forward computes for x [..., C], by the differentiable ops.

    Args:
        normed: how x came from the residual stream, which then is all that is saved.
    """
    called = plan.act_module is not None or isinstance(plan.fc2, Called)
    if plan.norm is None and plan.gate is None and not called:
        return ops.mlp(
            x, *plan.fc1, *plan.fc2, plan.act, gate=plan.packed, normed=normed, grn=plan.grn
        )
    hidden = _hidden(x, plan)
    if plan.norm is not None:
        hidden = _norm.apply(hidden, plan.norm)
    return project(hidden, plan.fc2)


def _hidden(x: torch.Tensor, plan: Mlp) -> torch.Tensor:
    act = plan.act_module
    if act is None:
        gate_weight, gate_bias = plan.gate or (None, None)
        return ops.linear_act(
            x,
            *plan.fc1,
            plan.act,
            gate=plan.packed,
            gate_weight=gate_weight,
            gate_bias=gate_bias,
        )
    if plan.gate is not None:
        gate, value = project(x, plan.gate), project(x, plan.fc1)
    elif plan.packed is None:
        return act(project(x, plan.fc1))  # type: ignore[no-any-return]
    else:
        gate, value = project(x, plan.fc1).chunk(2, -1)
        if plan.packed == "last":
            gate, value = value, gate
    return act(gate) * value  # type: ignore[no-any-return]
