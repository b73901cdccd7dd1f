"""Drop-ins for timm's Attention and AttentionRope."""

from __future__ import annotations

from typing import Any

import torch
from timm import layers as timm_layers

from vitfast import plans
from vitfast.blocks.parts import attend
from vitfast.layers.base import ATTENTION, Layer
from vitfast.layers.reading.as_built import expect_attributes
from vitfast.layers.reading.attention import ATTENTION_PLANS, head_dim, plan_common_attention
from vitfast.layers.reading.children import read_or_call_linear
from vitfast.plans import Called


def plan_attention(module: Any) -> plans.Attention:
    """How timm's `Attention` computes."""
    return plan_common_attention(module, (read_or_call_linear(module._modules, "qkv"),))


def plan_attention_rope(module: Any) -> plans.Attention:
    """How timm's `AttentionRope` computes."""
    children = module._modules
    names = ("qkv",) if children.get("qkv") is not None else ("q_proj", "k_proj", "v_proj")
    plan = plan_common_attention(module, tuple(read_or_call_linear(children, n) for n in names))
    dim = head_dim(module, plan.heads, plan.qkv)
    kv_heads = plan.heads
    if len(plan.qkv) == 3:
        value = plan.qkv[2]
        called = isinstance(value, Called)
        kv_heads = module.num_kv_heads if called else value.weight.shape[0] // dim
    groups = plan.heads // kv_heads if kv_heads and plan.heads % kv_heads == 0 else 0
    expect_attributes(module, num_kv_heads=kv_heads, num_kv_groups=groups)  # since timm 1.0.27
    return plan._replace(
        prefix=module.num_prefix_tokens,
        rope_half=getattr(module, "rotate_half", False),
        kv_groups=groups,
    )


class Attention(Layer, timm_layers.Attention):
    """`timm.layers.Attention` on `vitfast.ops.attention`."""

    role = "attention"
    ops = ATTENTION
    plan = staticmethod(plan_attention)

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        plan = self._plan_call(x, attn_mask)
        if plan is None or (is_causal and attn_mask is not None):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return attend(x, plan, mask=attn_mask, is_causal=is_causal)


class AttentionRope(Layer, timm_layers.AttentionRope):
    """`timm.layers.AttentionRope` on `vitfast.ops.attention`."""

    role = "attention"
    ops = ATTENTION
    plan = staticmethod(plan_attention_rope)

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


ATTENTION_PLANS[timm_layers.Attention] = plan_attention
ATTENTION_PLANS[timm_layers.AttentionRope] = plan_attention_rope
