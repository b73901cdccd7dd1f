"""Drop-ins for the attention and block of timm's ViTs with relative position bias."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import vision_transformer_relpos as relpos

from vitfast import plans
from vitfast.engine import memo
from vitfast.engine.eligibility import plan_call
from vitfast.layers import _attention, _block, _guard
from vitfast.layers._base import Layer


def plan_attention(module: Any) -> plans.Attention:
    """How timm's `RelPosAttention` computes."""
    return _attention.common(module, (_guard.layer(module._modules, "qkv"),))


def position_bias(module: Any, shared: torch.Tensor | None) -> dict[str, Any]:
    """The bias of `RelPosAttention`, as an argument of `attend`; its own wins, as in timm."""
    bias = shared if module.rel_pos is None else module.rel_pos.get_bias()
    return _attention.dense_bias(bias, module.num_heads)


class RelPosAttention(Layer, relpos.RelPosAttention):
    """`timm.models.vision_transformer_relpos.RelPosAttention` on `vitfast.ops.attention`."""

    role = "attention"
    plan = staticmethod(plan_attention)

    def forward(self, x: torch.Tensor, shared_rel_pos: torch.Tensor | None = None) -> torch.Tensor:
        plan = plan_call(plan_attention, self, x, shared_rel_pos)
        if plan is None:
            return super().forward(x, shared_rel_pos=shared_rel_pos)
        return _attention.attend(x, plan, **position_bias(self, shared_rel_pos))


class RelPosBlock(Layer, relpos.RelPosBlock):
    """`timm.models.vision_transformer_relpos.RelPosBlock`, norms and residuals fused."""

    role = "block"
    plan = staticmethod(_block.with_layer_scale)

    def forward(self, x: torch.Tensor, shared_rel_pos: torch.Tensor | None = None) -> torch.Tensor:
        plan = memo.recall_plan(_block.with_layer_scale, self, x, shared_rel_pos)
        if plan is None:
            return super().forward(x, shared_rel_pos=shared_rel_pos)
        return _block.run(
            x,
            plan,
            self,
            lambda y: self.attn(y, shared_rel_pos=shared_rel_pos),
            **({} if plan.attn_is_called else position_bias(self.attn, shared_rel_pos)),
        )


_attention.PLANS |= {relpos.RelPosAttention: plan_attention, RelPosAttention: plan_attention}
