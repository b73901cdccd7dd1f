"""The drop-in for `torch.nn.LayerNorm`, in a module of its own since it bears the same name."""

from __future__ import annotations

import torch
from timm.layers import register_notrace_module
from torch import nn

from vitfast.blocks.parts import apply_norm
from vitfast.layers.base import Layer
from vitfast.layers.reading.norm import plan_norm


@register_notrace_module
class LayerNorm(Layer, nn.LayerNorm):
    """`torch.nn.LayerNorm` on `vitfast.ops.layer_norm`.

    A leaf for FX, as torch's own modules are, so that node names stay what they were.
    """

    ops = ("layer_norm",)
    plan = staticmethod(plan_norm)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        plan = self._plan_call(input)
        return super().forward(input) if plan is None else apply_norm(input, plan)
