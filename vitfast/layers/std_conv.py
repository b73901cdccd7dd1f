"""Drop-ins for timm's weight-standardised convolutions, and the GroupNorm between them."""

from __future__ import annotations

import torch
from timm import layers as timm_layers

from vitfast.blocks.parts import apply_conv, apply_group_norm
from vitfast.layers.base import Layer
from vitfast.layers.reading.conv import plan_std_conv
from vitfast.layers.reading.group_norm import plan_group_norm


class StdConv2d(Layer, timm_layers.StdConv2d):
    """`timm.layers.StdConv2d`, standardising its weight once a version in inference."""

    ops = ("layer_norm",)
    plan = staticmethod(plan_std_conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._plan_call(x)
        return super().forward(x) if plan is None else apply_conv(x, plan)


class StdConv2dSame(Layer, timm_layers.StdConv2dSame):
    """`timm.layers.StdConv2dSame`, standardising its weight once a version in inference."""

    ops = ("layer_norm",)
    plan = staticmethod(plan_std_conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._plan_call(x)
        return super().forward(x) if plan is None else apply_conv(x, plan)


class GroupNormAct(Layer, timm_layers.GroupNormAct):
    """`timm.layers.GroupNormAct` on `vitfast.ops.group_norm_act`."""

    ops = ("group_norm_act",)
    plan = staticmethod(plan_group_norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._plan_call(x)
        if plan is None or x.ndim != 4 or not x.is_floating_point():
            return super().forward(x)
        return apply_group_norm(x, plan)


class GroupNorm1Act(Layer, timm_layers.GroupNorm1Act):
    """`timm.layers.GroupNorm1Act`, of one group, on `vitfast.ops.group_norm_act`."""

    ops = ("group_norm_act",)
    plan = staticmethod(plan_group_norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._plan_call(x)
        if plan is None or x.ndim != 4 or not x.is_floating_point():
            return super().forward(x)
        return apply_group_norm(x, plan)
