"""Drop-ins for the bottlenecks of timm's ResNetV2."""

from __future__ import annotations

import torch
from timm.models import resnetv2

from vitfast.blocks.bottleneck import run_bottleneck, run_preact_bottleneck
from vitfast.layers.base import Layer
from vitfast.layers.reading.bottleneck import plan_bottleneck, plan_preact_bottleneck


class Bottleneck(Layer, resnetv2.Bottleneck):
    """`timm.models.resnetv2.Bottleneck`, each norm with its activation in one pass."""

    ops = ("group_norm_act", "layer_norm")
    plan = staticmethod(plan_bottleneck)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._recall_plan(x)
        return super().forward(x) if plan is None else run_bottleneck(x, plan)


class PreActBottleneck(Layer, resnetv2.PreActBottleneck):
    """`timm.models.resnetv2.PreActBottleneck`, each norm with its activation in one pass."""

    ops = ("group_norm_act", "layer_norm")
    plan = staticmethod(plan_preact_bottleneck)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._plan_call(x)
        return super().forward(x) if plan is None else run_preact_bottleneck(x, plan)
