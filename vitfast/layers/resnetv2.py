"""Drop-ins for the bottlenecks of timm's ResNetV2."""

from __future__ import annotations

import torch
from timm.models import resnetv2

from vitfast.engine import memo
from vitfast.engine.eligibility import plan_call
from vitfast.layers import _bottleneck
from vitfast.layers._base import Layer


class Bottleneck(Layer, resnetv2.Bottleneck):
    """`timm.models.resnetv2.Bottleneck`, each norm with its activation in one pass."""

    plan = staticmethod(_bottleneck.plan)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = memo.recall_plan(_bottleneck.plan, self, x)
        return super().forward(x) if plan is None else _bottleneck.apply(x, plan)


class PreActBottleneck(Layer, resnetv2.PreActBottleneck):
    """`timm.models.resnetv2.PreActBottleneck`, each norm with its activation in one pass."""

    plan = staticmethod(_bottleneck.plan_preact)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = plan_call(_bottleneck.plan_preact, self, x)
        return super().forward(x) if plan is None else _bottleneck.apply_preact(x, plan)
