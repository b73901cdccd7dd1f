"""Drop-ins for the attention and block of timm's Hiera."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import hiera

from vitfast import plans
from vitfast.blocks.parts import attend
from vitfast.blocks.transformer import run_transformer_block
from vitfast.engine.eligibility import plan_call
from vitfast.layers.base import WINDOWED_BLOCK, WINDOWS, Layer
from vitfast.layers.reading.as_built import expect_attributes
from vitfast.layers.reading.attention import ATTENTION_PLANS, projections
from vitfast.layers.reading.block import plan_with_layer_scale
from vitfast.plans import Unfit, Unsupported


def plan_attention(module: Any) -> plans.Attention:
    """How timm's `MaskUnitAttention` computes, fused by timm or not."""
    if module.q_stride != 1:
        raise Unsupported("its queries are pooled")
    qkv, proj = projections(module, module.heads, module.fused_attn)
    expect_attributes(module, dim_out=qkv.weight.shape[0] // 3)
    return plans.Attention(heads=module.heads, qkv=(qkv,), proj=proj)


def plan_block(module: Any) -> plans.TransformerBlock:
    """How timm's `HieraBlock` computes."""
    if module.do_expand:
        raise Unsupported("it widens its input")
    if getattr(module.attn, "q_stride", 1) != 1:
        raise Unsupported("its queries are pooled")
    return plan_with_layer_scale(module)


def _windows(attn: Any, x: torch.Tensor) -> plans.Windows | None:
    """Its mask units, whose tokens lie as far apart as there are units; None for all tokens."""
    if not attn.use_mask_unit_attn:
        return None
    tokens = x.shape[1]
    units = tokens // attn.window_size
    if units == 0 or tokens % units:
        raise Unfit("its mask units do not divide the tokens")
    return plans.Windows((tokens, 1), (tokens // units, 1), grid=True)


def _of_input(
    plan: plans.TransformerBlock, attn: Any, x: torch.Tensor
) -> tuple[plans.TransformerBlock, plans.Windows | None]:
    return plan, None if plan.attn_is_called else _windows(attn, x)


class MaskUnitAttention(Layer, hiera.MaskUnitAttention):
    """`timm.models.hiera.MaskUnitAttention`; mask units are a grid of `ops.window_attention`."""

    role = "attention"
    ops = ("attention", *WINDOWS)
    plan = staticmethod(plan_attention)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        planned = plan_call(lambda m: (plan_attention(m), _windows(m, x)), self, x)
        if planned is None:
            return super().forward(x)
        plan, windows = planned
        return attend(x, plan, windows=windows)


class HieraBlock(Layer, hiera.HieraBlock):
    """`timm.models.hiera.HieraBlock` where it neither pools nor widens."""

    role = "block"
    ops = ("attention", *WINDOWED_BLOCK)
    plan = staticmethod(plan_block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        planned = plan_call(lambda m: _of_input(plan_block(m), m.attn, x), self, x)
        if planned is None:
            return super().forward(x)
        plan, windows = planned
        return run_transformer_block(x, plan, self, self.attn, windows=windows)


ATTENTION_PLANS[hiera.MaskUnitAttention] = plan_attention
