"""Drop-ins for the parts of timm's Swin Transformer V2."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import swin_transformer_v2

from vitfast import plans
from vitfast.blocks.patch_merging import run_patch_merging
from vitfast.layers import windowed
from vitfast.layers.base import NORM, WINDOWED_BLOCK, WINDOWS, Layer
from vitfast.layers.reading.attention import (
    ATTENTION_PLANS,
    check_softmax,
    projections,
    read_packed_bias,
)
from vitfast.layers.reading.block import plan_patch_merging_norm_last
from vitfast.layers.reading.children import check_no_dropout, read_parameter
from vitfast.layers.reading.position import check_position_index, swin_v2_table
from vitfast.plans import Unfit


def plan_attention(module: Any) -> plans.Attention:
    """How timm's Swin V2 `WindowAttention` computes."""
    children = module._modules
    check_no_dropout(children, "attn_drop")
    check_no_dropout(children, "proj_drop")
    qkv, proj = projections(module, module.num_heads, True)
    logit_scale = read_parameter(module, "logit_scale")
    if logit_scale.shape != (module.num_heads, 1, 1):
        raise Unfit(f"logit_scale has shape {tuple(logit_scale.shape)}")
    check_softmax(children)
    check_position_index(module, tuple(module.window_size))
    return plans.Attention(
        heads=module.num_heads,
        qkv=(qkv._replace(bias=read_packed_bias(module)),),
        proj=proj,
        table=swin_v2_table(module.cpb_mlp, module.relative_coords_table, module.num_heads),
        logit_scale=logit_scale.flatten(),
    )


class WindowAttention(Layer, swin_transformer_v2.WindowAttention):
    """`timm.models.swin_transformer_v2.WindowAttention`, as that of Swin."""

    role = "attention"
    ops = WINDOWS
    plan = staticmethod(plan_attention)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        out = windowed.attend_windows(self, x, mask)
        return super().forward(x, mask=mask) if out is None else out


class SwinTransformerV2Block(Layer, swin_transformer_v2.SwinTransformerV2Block):
    """`timm.models.swin_transformer_v2.SwinTransformerV2Block`, as `SwinTransformerBlock`."""

    role = "block"
    ops = WINDOWED_BLOCK
    plan = staticmethod(windowed.plan_norms_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = windowed.run_windowed_block(self, x)
        return super().forward(x) if out is None else out


class PatchMerging(Layer, swin_transformer_v2.PatchMerging):
    """`timm.models.swin_transformer_v2.PatchMerging` on `vitfast.ops.patch_merge`."""

    ops = ("linear_act", "patch_merge", *NORM)
    plan = staticmethod(plan_patch_merging_norm_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = run_patch_merging(self, x)
        return super().forward(x) if out is None else out


ATTENTION_PLANS[swin_transformer_v2.WindowAttention] = plan_attention
