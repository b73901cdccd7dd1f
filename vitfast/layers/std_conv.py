"""Drop-ins for timm's weight-standardised convolutions, and the GroupNorm between them."""

from __future__ import annotations

import torch
from timm import layers as timm_layers

from vitfast.engine.eligibility import plan_call
from vitfast.layers import _conv, _group_norm
from vitfast.layers._base import Layer


class StdConv2d(Layer, timm_layers.StdConv2d):
    """`timm.layers.StdConv2d`, standardising its weight once a version in inference."""

    plan = staticmethod(_conv.plan)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = plan_call(_conv.plan, self, x)
        return super().forward(x) if plan is None else _conv.apply(x, plan)


class StdConv2dSame(Layer, timm_layers.StdConv2dSame):
    """`timm.layers.StdConv2dSame`, standardising its weight once a version in inference."""

    plan = staticmethod(_conv.plan)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = plan_call(_conv.plan, self, x)
        return super().forward(x) if plan is None else _conv.apply(x, plan)


class GroupNormAct(Layer, timm_layers.GroupNormAct):
    """`timm.layers.GroupNormAct` on `vitfast.ops.group_norm_act`."""

    plan = staticmethod(_group_norm.plan)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = plan_call(_group_norm.plan, self, x)
        if plan is None or x.ndim != 4 or not x.is_floating_point():
            return super().forward(x)
        return _group_norm.apply(x, plan)


class GroupNorm1Act(Layer, timm_layers.GroupNorm1Act):
    """`timm.layers.GroupNorm1Act`, of one group, on `vitfast.ops.group_norm_act`."""

    plan = staticmethod(_group_norm.plan)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = plan_call(_group_norm.plan, self, x)
        if plan is None or x.ndim != 4 or not x.is_floating_point():
            return super().forward(x)
        return _group_norm.apply(x, plan)


_conv.KINDS |= {StdConv2d, StdConv2dSame}
_group_norm.KINDS |= {GroupNormAct, GroupNorm1Act}
