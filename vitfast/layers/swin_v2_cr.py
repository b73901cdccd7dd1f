"""Drop-ins for the parts of timm's Swin Transformer V2 by Christoph Reich."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import swin_transformer_v2_cr

from vitfast import plans
from vitfast.blocks.patch_merging import run_patch_merging
from vitfast.layers import windowed
from vitfast.layers.base import NORM, WINDOWED_BLOCK, WINDOWS, Layer
from vitfast.layers.reading.as_built import expect_buffer
from vitfast.layers.reading.attention import ATTENTION_PLANS, projections
from vitfast.layers.reading.block import plan_patch_merging
from vitfast.layers.reading.children import check_no_dropout, expect_vector, read_parameter
from vitfast.layers.reading.mlp import read_mlp
from vitfast.layers.reading.position import position_index
from vitfast.plans import Unfit


def plan_attention(module: Any) -> plans.Attention:
    """How timm's `WindowMultiHeadAttention` computes.

    While the MLP of its position biases drops (1 in 8 by default in training) these differ from one
    pair of tokens to the next of the same relative position: that is for timm.
    """
    children = module._modules
    check_no_dropout(children, "attn_drop")
    check_no_dropout(children, "proj_drop")
    read_mlp(children, "meta_mlp")
    qkv, proj = projections(module, module.num_heads, True)
    window, logit_scale = tuple(module.window_size), read_parameter(module, "logit_scale")
    if logit_scale is None:
        raise Unfit("it has no logit_scale")
    expect_vector(logit_scale, module.num_heads, "logit_scale")
    expect_buffer(
        module,
        "relative_coordinates_log",
        lambda found: _coordinates(found, window)[position_index(window).flatten()],
        window,
    )
    return plans.Attention(
        heads=module.num_heads,
        qkv=(qkv,),
        proj=proj,
        table=module.meta_mlp(_coordinates(module.relative_coordinates_log, window)),
        logit_scale=logit_scale,
    )


def _coordinates(of_pairs: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """Of each relative position, [(2h - 1)(2w - 1), 2], from those of every pair of tokens."""
    pairs = of_pairs.view(*window, *window, 2)
    y = torch.cat((pairs[0, 0, 1:, 0, 0].flip(0), pairs[:, 0, 0, 0, 0]))
    x = torch.cat((pairs[0, 0, 0, 1:, 1].flip(0), pairs[0, :, 0, 0, 1]))
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).view(-1, 2)


class WindowMultiHeadAttention(Layer, swin_transformer_v2_cr.WindowMultiHeadAttention):
    """`timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention`, as Swin's."""

    role = "attention"
    ops = WINDOWS
    plan = staticmethod(plan_attention)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        out = windowed.attend_windows(self, x, mask)
        return super().forward(x, mask=mask) if out is None else out


class SwinTransformerV2CrBlock(Layer, swin_transformer_v2_cr.SwinTransformerV2CrBlock):
    """`timm.models.swin_transformer_v2_cr.SwinTransformerV2CrBlock`, as Swin V2's."""

    role = "block"
    ops = WINDOWED_BLOCK
    plan = staticmethod(windowed.plan_norms_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = windowed.run_windowed_block(self, x, "_shifted_window_attn")
        return super().forward(x) if out is None else self.norm3(out)


class PatchMerging(Layer, swin_transformer_v2_cr.PatchMerging):
    """`timm.models.swin_transformer_v2_cr.PatchMerging`, as Swin's."""

    ops = ("linear_act", "patch_merge", *NORM)
    plan = staticmethod(plan_patch_merging)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = run_patch_merging(self, x)
        return super().forward(x) if out is None else out


ATTENTION_PLANS[swin_transformer_v2_cr.WindowMultiHeadAttention] = plan_attention
