"""Drop-in for the ViT block of timm."""

from __future__ import annotations

import torch
from timm.models import vision_transformer

from vitfast.blocks.transformer import run_transformer_block
from vitfast.layers.base import BLOCK, Layer
from vitfast.layers.reading.block import plan_with_layer_scale


class Block(Layer, vision_transformer.Block):
    """`timm.models.vision_transformer.Block` with fused norms, residuals and activations."""

    role = "block"
    ops = BLOCK
    plan = staticmethod(plan_with_layer_scale)

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        plan = self._recall_plan(x, attn_mask)
        if plan is None or (is_causal and attn_mask is not None):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return run_transformer_block(
            x,
            plan,
            self,
            lambda y: self.attn(y, attn_mask=attn_mask, is_causal=is_causal),
            mask=attn_mask,
            is_causal=is_causal,
        )
