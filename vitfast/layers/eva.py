"""Drop-ins for EVA's attention and block (EVA-02, DINOv3, Perception Encoder, NaFlexViT)."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import eva

from vitfast import plans
from vitfast.blocks.parts import attend
from vitfast.blocks.transformer import run_transformer_block
from vitfast.layers.base import ATTENTION, BLOCK, Layer
from vitfast.layers.reading.attention import (
    ATTENTION_PLANS,
    check_attention_width,
    plan_common_attention,
    read_packed_qkv,
)
from vitfast.layers.reading.block import plan_with_gammas
from vitfast.layers.reading.children import read_or_call_linear


def plan_attention(module: Any) -> plans.Attention:
    """How timm's `EvaAttention` computes.

    With `qkv_bias_separate` timm adds the bias after the product, which here is one step.
    """
    children = module._modules
    if children.get("qkv") is not None:
        plan = plan_common_attention(module, (read_packed_qkv(module),))
    else:
        plan = plan_common_attention(
            module, tuple(read_or_call_linear(children, n) for n in ("q_proj", "k_proj", "v_proj"))
        )
    return check_attention_width(plan)._replace(
        prefix=module.num_prefix_tokens, rope_half=getattr(module, "rotate_half", False)
    )


class EvaAttention(Layer, eva.EvaAttention):
    """`timm.models.eva.EvaAttention` on `vitfast.ops.attention`."""

    role = "attention"
    ops = ATTENTION
    plan = staticmethod(plan_attention)

    def forward(
        self,
        x: torch.Tensor,
        rope: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        plan = self._plan_call(x, attn_mask, rope)
        if plan is None or (is_causal and attn_mask is not None):
            return super().forward(x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        return attend(x, plan, mask=attn_mask, rope=rope, is_causal=is_causal)


class EvaBlock(Layer, eva.EvaBlock):
    """`timm.models.eva.EvaBlock` with fused norms, residuals and activations."""

    role = "block"
    ops = BLOCK
    plan = staticmethod(plan_with_gammas)

    def forward(
        self,
        x: torch.Tensor,
        rope: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        plan = self._recall_plan(x, attn_mask, rope)
        if plan is None or (is_causal and attn_mask is not None):
            return super().forward(x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        return run_transformer_block(
            x,
            plan,
            self,
            lambda y: self.attn(y, rope=rope, attn_mask=attn_mask, is_causal=is_causal),
            mask=attn_mask,
            rope=rope,
            is_causal=is_causal,
        )


ATTENTION_PLANS[eva.EvaAttention] = plan_attention
