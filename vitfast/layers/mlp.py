"""Drop-ins for timm's Mlp, GluMlp, SwiGLU and GlobalResponseNormMlp."""

from __future__ import annotations

import torch
from timm import layers as timm_layers
from torch import nn

from vitfast import plans
from vitfast.blocks.parts import apply_mlp
from vitfast.layers.base import MLP, Layer
from vitfast.layers.reading.as_built import expect_attributes
from vitfast.layers.reading.children import (
    check_bare,
    check_no_dropout,
    read_activation,
    read_linear,
    read_or_call_linear,
)
from vitfast.layers.reading.mlp import (
    MLP_PLANS,
    POINTWISE_MLP_PLANS,
    plan_common_mlp,
    with_act_module,
)
from vitfast.layers.reading.norm import read_grn
from vitfast.plans import Unsupported


def plan_mlp(module: nn.Module) -> plans.Mlp:
    """How timm's `Mlp` computes."""
    return plan_common_mlp(module, "fc1")


def plan_pointwise(module: nn.Module) -> plans.Mlp:
    """As `plan_mlp`, where the caller's channels come last, and linears may be convolutions."""
    return plan_common_mlp(module, "fc1", pointwise=True)


def plan_grn_mlp(module: nn.Module) -> plans.Mlp:
    """How timm's `GlobalResponseNormMlp` computes, on channels last."""
    plan = plan_pointwise(module)
    channel_dim = -1 if plan.fc1.weight.ndim == 2 else 1
    return plan._replace(grn=read_grn(module._modules, "grn", channel_dim))


def plan_conv_mlp(module: nn.Module) -> plans.Mlp:
    """How timm's `ConvMlp` computes, on channels last."""
    children = module._modules
    if type(children["norm"]) is not nn.Identity:
        raise Unsupported("its MLP has a norm before the activation")
    check_bare(children["norm"], "norm")
    act = read_activation(children, "act")
    check_no_dropout(children, "drop")
    return plans.Mlp(
        fc1=read_linear(children, "fc1", pointwise=True),
        act=act,
        fc2=read_linear(children, "fc2", pointwise=True),
        norm=None,
    )


def plan_glu_mlp(module: nn.Module) -> plans.Mlp:
    """How timm's `GluMlp` computes: both halves from one projection."""
    expect_attributes(module, chunk_dim=-1)
    packed = "last" if module.gate_last else "first"
    return plan_common_mlp(module, "fc1")._replace(packed=packed)


def plan_swiglu(module: nn.Module) -> plans.Mlp:
    """How timm's `SwiGLU` computes: gate and value from a projection each."""
    plan = plan_common_mlp(module, "fc1_x")
    return with_act_module(
        plan._replace(gate=read_or_call_linear(module._modules, "fc1_g")), module
    )


class Mlp(Layer, timm_layers.Mlp):
    """`timm.layers.Mlp` on `vitfast.ops.linear_act`."""

    ops = MLP
    plan = staticmethod(plan_mlp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._plan_call(x)
        return super().forward(x) if plan is None else apply_mlp(x, plan)


class GlobalResponseNormMlp(Layer, timm_layers.GlobalResponseNormMlp):
    """`timm.layers.GlobalResponseNormMlp` on `vitfast.ops.linear_act` and `vitfast.ops.grn`."""

    ops = ("grn", "linear_act", "mlp")
    plan = staticmethod(plan_grn_mlp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._plan_call(x)
        if plan is None or x.ndim != 4:
            return super().forward(x)
        if plan.fc1.weight.ndim == 2:
            return apply_mlp(x, plan)
        return apply_mlp(x.permute(0, 2, 3, 1), plan).permute(0, 3, 1, 2)


class GluMlp(Layer, timm_layers.GluMlp):
    """`timm.layers.GluMlp` (SwiGLUPacked, GeGLU) on `vitfast.ops.linear_act`."""

    ops = MLP
    plan = staticmethod(plan_glu_mlp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._plan_call(x)
        return super().forward(x) if plan is None else apply_mlp(x, plan)


class SwiGLU(Layer, timm_layers.SwiGLU):
    """`timm.layers.SwiGLU` on `vitfast.ops.linear_act`."""

    ops = MLP
    plan = staticmethod(plan_swiglu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._plan_call(x)
        return super().forward(x) if plan is None else apply_mlp(x, plan)


MLP_PLANS |= {
    timm_layers.Mlp: plan_mlp,
    timm_layers.GluMlp: plan_glu_mlp,
    timm_layers.SwiGLU: plan_swiglu,
}
POINTWISE_MLP_PLANS |= {
    timm_layers.Mlp: plan_pointwise,
    timm_layers.ConvMlp: plan_conv_mlp,
    timm_layers.GlobalResponseNormMlp: plan_grn_mlp,
}
