"""Drop-ins for the attention and block of timm's ViTs with relative position bias."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import vision_transformer_relpos as relpos

from vitfast import plans
from vitfast.blocks.parts import attend
from vitfast.blocks.transformer import run_transformer_block
from vitfast.layers.base import ATTENTION, BLOCK, Layer
from vitfast.layers.reading.attention import ATTENTION_PLANS, dense_bias, plan_common_attention
from vitfast.layers.reading.block import plan_with_layer_scale
from vitfast.layers.reading.children import read_or_call_linear


def plan_attention(module: Any) -> plans.Attention:
    """How timm's `RelPosAttention` computes."""
    return plan_common_attention(module, (read_or_call_linear(module._modules, "qkv"),))


def position_bias(module: Any, shared: torch.Tensor | None) -> dict[str, Any]:
    """The bias of `RelPosAttention`, as an argument of `attend`; its own wins, as in timm."""
    bias = shared if module.rel_pos is None else module.rel_pos.get_bias()
    return dense_bias(bias, module.num_heads)


class RelPosAttention(Layer, relpos.RelPosAttention):
    """`timm.models.vision_transformer_relpos.RelPosAttention` on `vitfast.ops.attention`."""

    role = "attention"
    ops = ATTENTION
    plan = staticmethod(plan_attention)

    def forward(self, x: torch.Tensor, shared_rel_pos: torch.Tensor | None = None) -> torch.Tensor:
        plan = self._plan_call(x, shared_rel_pos)
        if plan is None:
            return super().forward(x, shared_rel_pos=shared_rel_pos)
        return attend(x, plan, **position_bias(self, shared_rel_pos))


class RelPosBlock(Layer, relpos.RelPosBlock):
    """`timm.models.vision_transformer_relpos.RelPosBlock`, norms and residuals fused."""

    role = "block"
    ops = BLOCK
    plan = staticmethod(plan_with_layer_scale)

    def forward(self, x: torch.Tensor, shared_rel_pos: torch.Tensor | None = None) -> torch.Tensor:
        plan = self._recall_plan(x, shared_rel_pos)
        if plan is None:
            return super().forward(x, shared_rel_pos=shared_rel_pos)
        return run_transformer_block(
            x,
            plan,
            self,
            lambda y: self.attn(y, shared_rel_pos=shared_rel_pos),
            **({} if plan.attn_is_called else position_bias(self.attn, shared_rel_pos)),
        )


ATTENTION_PLANS[relpos.RelPosAttention] = plan_attention
