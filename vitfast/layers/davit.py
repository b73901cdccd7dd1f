"""Drop-ins for the windowed parts of timm's DaViT."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import davit

from vitfast import plans
from vitfast.blocks.transformer import run_attention_half, run_mlp_half
from vitfast.layers import windowed
from vitfast.layers.base import WINDOWED_BLOCK, WINDOWS, Layer
from vitfast.layers.reading.attention import ATTENTION_PLANS, projections
from vitfast.layers.reading.block import plan_without_layer_scale
from vitfast.layers.reading.children import check_read
from vitfast.plans import Unsupported


def plan_attention(module: Any) -> plans.Attention:
    """How timm's DaViT `WindowAttention` computes, fused by timm or not."""
    qkv, proj = projections(module, module.num_heads, module.fused_attn)
    return plans.Attention(heads=module.num_heads, qkv=(qkv,), proj=proj)


def plan_block(module: Any) -> plans.TransformerBlock:
    """How timm's `SpatialBlock` computes, its convolutions aside."""
    if module.mlp is None:
        raise Unsupported("it has no MLP")
    plan = plan_without_layer_scale(module)
    check_read(plan.attn)  # timm has no method that attends to a map
    return plan


class WindowAttention(Layer, davit.WindowAttention):
    """`timm.models.davit.WindowAttention` on `vitfast.ops.window_attention`."""

    role = "attention"
    ops = WINDOWS
    plan = staticmethod(plan_attention)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = windowed.attend_windows(self, x, None)
        return super().forward(x) if out is None else out


class SpatialBlock(Layer, davit.SpatialBlock):
    """`timm.models.davit.SpatialBlock`: its convolutions are called, its windows index arithmetic.

    The convolution between attention and MLP keeps the two from running as one.
    """

    role = "block"
    ops = WINDOWED_BLOCK
    plan = staticmethod(plan_block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._recall_plan(x)
        if plan is None or x.ndim != 4:
            return super().forward(x)
        size = (x.shape[2], x.shape[3])
        windows = plans.Windows(size, tuple(self.window_size))
        tokens = self.cpe1(x).flatten(2).transpose(1, 2)
        tokens = run_attention_half(tokens, plan, windows=windows)
        x = self.cpe2(tokens.transpose(1, 2).unflatten(2, size))
        tokens = run_mlp_half(x.flatten(2).transpose(1, 2), plan, self)
        return tokens.transpose(1, 2).unflatten(2, size)


ATTENTION_PLANS[davit.WindowAttention] = plan_attention
