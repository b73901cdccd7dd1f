"""The drop-in for `torch.nn.LayerNorm`, in a module of its own since it bears the same name."""

from __future__ import annotations

import torch
from timm.layers import register_notrace_module
from torch import nn

from vitfast.engine.eligibility import plan_call
from vitfast.layers import _norm
from vitfast.layers._base import Layer


@register_notrace_module
class LayerNorm(Layer, nn.LayerNorm):
    """`torch.nn.LayerNorm` on `vitfast.ops.layer_norm`.

    A leaf for FX, as torch's own modules are, so that node names stay what they were.
    """

    plan = staticmethod(_norm.plan)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        plan = plan_call(_norm.plan, self, input)
        return super().forward(input) if plan is None else _norm.apply(input, plan)


_norm.KINDS[LayerNorm] = "layer"
