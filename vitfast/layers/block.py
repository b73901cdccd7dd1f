"""Drop-in for the ViT block of timm."""

from __future__ import annotations

import torch
from timm.models import vision_transformer

from vitfast.engine import memo
from vitfast.layers import _block
from vitfast.layers._base import Layer


class Block(Layer, vision_transformer.Block):
    """`timm.models.vision_transformer.Block` with fused norms, residuals and activations."""

    role = "block"
    plan = staticmethod(_block.with_layer_scale)

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        plan = memo.recall_plan(_block.with_layer_scale, self, x, attn_mask)
        if plan is None or (is_causal and attn_mask is not None):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return _block.run(
            x,
            plan,
            self,
            lambda y: self.attn(y, attn_mask=attn_mask, is_causal=is_causal),
            mask=attn_mask,
            is_causal=is_causal,
        )
