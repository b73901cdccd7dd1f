"""Drop-ins for EVA's attention and block (EVA-02, DINOv3, Perception Encoder, NaFlexViT)."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import eva

from vitfast import plans
from vitfast.engine import memo
from vitfast.engine.eligibility import plan_call
from vitfast.layers import _attention, _block, _guard
from vitfast.layers._base import Layer


def plan_attention(module: Any) -> plans.Attention:
    """How timm's `EvaAttention` computes.

    With `qkv_bias_separate` timm adds the bias after the product, which here is one step.
    """
    children = module._modules
    if children.get("qkv") is not None:
        plan = _attention.common(module, (_attention.packed(module),))
    else:
        plan = _attention.common(
            module, tuple(_guard.layer(children, n) for n in ("q_proj", "k_proj", "v_proj"))
        )
    return _attention.check_width(plan)._replace(
        prefix=module.num_prefix_tokens, rope_half=getattr(module, "rotate_half", False)
    )


class EvaAttention(Layer, eva.EvaAttention):
    """`timm.models.eva.EvaAttention` on `vitfast.ops.attention`."""

    role = "attention"
    plan = staticmethod(plan_attention)

    def forward(
        self,
        x: torch.Tensor,
        rope: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        plan = plan_call(plan_attention, self, x, attn_mask, rope)
        if plan is None or (is_causal and attn_mask is not None):
            return super().forward(x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        return _attention.attend(x, plan, mask=attn_mask, rope=rope, is_causal=is_causal)


class EvaBlock(Layer, eva.EvaBlock):
    """`timm.models.eva.EvaBlock` with fused norms, residuals and activations."""

    role = "block"
    plan = staticmethod(_block.with_gammas)

    def forward(
        self,
        x: torch.Tensor,
        rope: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        plan = memo.recall_plan(_block.with_gammas, self, x, attn_mask, rope)
        if plan is None or (is_causal and attn_mask is not None):
            return super().forward(x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        return _block.run(
            x,
            plan,
            self,
            lambda y: self.attn(y, rope=rope, attn_mask=attn_mask, is_causal=is_causal),
            mask=attn_mask,
            rope=rope,
            is_causal=is_causal,
        )


_attention.PLANS |= {eva.EvaAttention: plan_attention, EvaAttention: plan_attention}
