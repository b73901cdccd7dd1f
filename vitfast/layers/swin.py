"""Drop-ins for the parts of timm's Swin Transformer."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import swin_transformer

from vitfast import plans
from vitfast.blocks.patch_merging import run_patch_merging
from vitfast.layers import windowed
from vitfast.layers.base import WINDOWED_BLOCK, WINDOWS, Layer
from vitfast.layers.reading.as_built import expect_attributes
from vitfast.layers.reading.attention import ATTENTION_PLANS, projections
from vitfast.layers.reading.block import plan_patch_merging
from vitfast.layers.reading.children import check_no_dropout, read_parameter
from vitfast.layers.reading.position import check_position_index
from vitfast.plans import Unfit


def plan_attention(module: Any) -> plans.Attention:
    """How timm's Swin `WindowAttention` computes, fused by timm or not."""
    children = module._modules
    check_no_dropout(children, "attn_drop")
    check_no_dropout(children, "proj_drop")
    qkv, proj = projections(module, module.num_heads, module.fused_attn)
    window = tuple(module.window_size)
    expect_attributes(module, window_area=window[0] * window[1])
    check_position_index(module, window)
    table = read_parameter(module, "relative_position_bias_table")
    if table is None:
        raise Unfit("it has no relative_position_bias_table")
    return plans.Attention(heads=module.num_heads, qkv=(qkv,), proj=proj, table=table)


class WindowAttention(Layer, swin_transformer.WindowAttention):
    """`timm.models.swin_transformer.WindowAttention` on `vitfast.ops.window_attention`.

    With a mask, which timm's block gives where it shifts, timm's forward: the drop-in block needs
    neither the mask nor this module's forward.
    """

    role = "attention"
    ops = WINDOWS
    plan = staticmethod(plan_attention)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        out = windowed.attend_windows(self, x, mask)
        return super().forward(x, mask=mask) if out is None else out


class SwinTransformerBlock(Layer, swin_transformer.SwinTransformerBlock):
    """`timm.models.swin_transformer.SwinTransformerBlock`, its windows as index arithmetic."""

    role = "block"
    ops = WINDOWED_BLOCK
    plan = staticmethod(windowed.plan_norms_first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = windowed.run_windowed_block(self, x)
        return super().forward(x) if out is None else out


class PatchMerging(Layer, swin_transformer.PatchMerging):
    """`timm.models.swin_transformer.PatchMerging` on `vitfast.ops.patch_merge`."""

    ops = ("linear_act", "patch_merge")
    plan = staticmethod(plan_patch_merging)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = run_patch_merging(self, x)
        return super().forward(x) if out is None else out


ATTENTION_PLANS[swin_transformer.WindowAttention] = plan_attention
