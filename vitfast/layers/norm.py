"""Drop-ins for timm's LayerNorm and RmsNorm."""

from __future__ import annotations

import torch
from timm import layers as timm_layers

from vitfast.layers import _guard, _norm
from vitfast.layers._base import Layer


class LayerNorm(Layer, timm_layers.LayerNorm):
    """`timm.layers.LayerNorm` on `vitfast.ops.layer_norm`."""

    plan = staticmethod(_norm.plan)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = _guard.ready(_norm.plan, self, x)
        return super().forward(x) if plan is None else _norm.apply(x, plan)


class RmsNorm(Layer, timm_layers.RmsNorm):
    """`timm.layers.RmsNorm` on `vitfast.ops.rms_norm`."""

    plan = staticmethod(_norm.plan)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = _guard.ready(_norm.plan, self, x)
        return super().forward(x) if plan is None else _norm.apply(x, plan)


_norm.KINDS[LayerNorm] = "layer"
_norm.KINDS[RmsNorm] = "rms"
