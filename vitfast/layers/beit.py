"""Drop-ins for BEiT's attention and block, under the names they bear in `timm.models.beit`."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import beit

from vitfast import plans
from vitfast.blocks.parts import attend
from vitfast.blocks.transformer import run_transformer_block
from vitfast.layers.base import ATTENTION, BLOCK, Layer
from vitfast.layers.reading.attention import (
    ATTENTION_PLANS,
    check_attention_width,
    dense_bias,
    plan_common_attention,
    read_packed_qkv,
)
from vitfast.layers.reading.block import plan_with_gammas
from vitfast.layers.reading.children import read_optional_parameter
from vitfast.plans import Unfit


def plan_attention(module: Any) -> plans.Attention:
    """How BEiT's `Attention` computes.

    With `qkv_bias_separate` timm adds the bias after the product, which here is one step.
    """
    if read_optional_parameter(module, "relative_position_bias_table") is not None:
        tokens = module.relative_position_index.shape[0]
        if tokens != module.window_size[0] * module.window_size[1] + 1:
            raise Unfit("its position index is not of its window size")
    return check_attention_width(plan_common_attention(module, (read_packed_qkv(module),)))


def plan_block(module: Any) -> plans.TransformerBlock:
    """How BEiT's `Block` computes."""
    if (module.gamma_1 is None) != (module.gamma_2 is None):
        raise Unfit("it has one of gamma_1 and gamma_2")
    return plan_with_gammas(module)


def position_bias(module: Any, shared: torch.Tensor | None) -> dict[str, Any]:
    """The relative position bias of BEiT's `Attention`, as an argument of `attend`."""
    table = module.relative_position_bias_table
    if table is None:
        return dense_bias(shared, module.num_heads)
    # As timm's _get_rel_pos_bias, but head by head: each reads its own short row of the table, and
    # nothing is left to permute.
    index = module.relative_position_index
    every_pair = index.reshape(1, -1).expand(module.num_heads, -1)
    bias = table.t().contiguous().gather(1, every_pair).unflatten(1, index.shape)
    return dense_bias(bias if shared is None else bias + shared, module.num_heads)


class Attention(Layer, beit.Attention):
    """`timm.models.beit.Attention` on `vitfast.ops.attention`."""

    role = "attention"
    ops = ATTENTION
    plan = staticmethod(plan_attention)

    def forward(
        self, x: torch.Tensor, shared_rel_pos_bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        plan = self._plan_call(x, shared_rel_pos_bias)
        if plan is None:
            return super().forward(x, shared_rel_pos_bias=shared_rel_pos_bias)
        return attend(x, plan, **position_bias(self, shared_rel_pos_bias))


class Block(Layer, beit.Block):
    """`timm.models.beit.Block` with fused norms, residuals and activations."""

    role = "block"
    ops = BLOCK
    plan = staticmethod(plan_block)

    def forward(
        self, x: torch.Tensor, shared_rel_pos_bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        plan = self._recall_plan(x, shared_rel_pos_bias)
        if plan is None:
            return super().forward(x, shared_rel_pos_bias=shared_rel_pos_bias)
        return run_transformer_block(
            x,
            plan,
            self,
            lambda y: self.attn(y, shared_rel_pos_bias=shared_rel_pos_bias),
            **({} if plan.attn_is_called else position_bias(self.attn, shared_rel_pos_bias)),
        )


ATTENTION_PLANS[beit.Attention] = plan_attention
