"""How the MLP layers read their weights: from a module of timm to an `Mlp`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from vitfast.layers.reading.children import (
    Children,
    check_bare,
    check_no_dropout,
    check_read,
    read_activation,
    read_linear,
    read_or_call_linear,
    timm_class,
)
from vitfast.layers.reading.norm import read_optional_norm
from vitfast.plans import Called, Mlp, Unfit, Unsupported

MLP_PLANS: dict[type[nn.Module], Callable[[nn.Module], Mlp]] = {}
"""The plan function of each MLP of timm."""
POINTWISE_MLP_PLANS: dict[type[nn.Module], Callable[[nn.Module], Mlp]] = {}
"""Those whose linear layers may be 1x1 convolutions."""


def read_mlp(children: Children, name: str) -> Mlp:
    """What a child holds that must be a known MLP, all of whose weights are read."""
    module = children[name]
    plan = MLP_PLANS.get(timm_class(module))
    if plan is None:
        raise Unsupported(f"MLP {type(module).__name__} is not implemented")
    check_bare(module, name)
    return check_mlp_read(plan(module))


def check_mlp_read(plan: Mlp) -> Mlp:
    """The plan, all of whose weights are read.

    Raises:
        Unfit: one of its linear layers has to be called.
    """
    check_read(plan.fc1, plan.gate, plan.fc2)
    return plan


def read_pointwise_mlp(children: Children, name: str) -> Mlp:
    """As `read_mlp`, channels last: the linear layers of the MLP may be 1x1 convolutions."""
    module = children[name]
    plan = POINTWISE_MLP_PLANS.get(timm_class(module))
    if plan is None:
        raise Unfit(f"{name} is a {type(module).__name__}, no MLP that vitfast knows")
    check_bare(module, name)
    return plan(module)


def plan_common_mlp(
    module: nn.Module, fc1: str, *, pointwise: bool = False, act: str | None = None
) -> Mlp:
    """The parts that all MLPs have alike.

    Args:
        pointwise: 1x1 convolutions are linear layers, too.
        act: instead of the module's, which the caller has looked at.
    """
    children = module._modules
    if not pointwise and type(children[fc1]) is nn.Conv2d:
        raise Unsupported("linear layers as convolutions over NCHW are not implemented")
    act = act or read_activation(children, "act")
    check_no_dropout(children, "drop1")
    check_no_dropout(children, "drop2")
    # A convolution is called on NCHW, which is not what there is.
    layer = partial(read_linear, pointwise=True) if pointwise else read_or_call_linear
    plan = Mlp(
        fc1=layer(children, fc1),
        act=act,
        fc2=layer(children, "fc2"),
        norm=read_optional_norm(children, "norm"),
    )
    if plan.norm is not None and not isinstance(plan.fc2, Called):
        plan.norm.check_width(plan.fc2.weight.shape[1])
    return with_act_module(plan, module)


def with_act_module(plan: Mlp, module: nn.Module) -> Mlp:
    """The plan with the activation to call, where a projection before it is called."""
    if isinstance(plan.fc1, Called) or isinstance(plan.gate, Called):
        return plan._replace(act_module=module._modules["act"])
    return plan
