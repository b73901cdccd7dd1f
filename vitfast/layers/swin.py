"""Drop-ins for the parts of timm's Swin Transformer."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import swin_transformer

from vitfast import plans
from vitfast.layers import _as_built, _attention, _guard, _patch_merging, _position, _windowed
from vitfast.layers._base import Layer
from vitfast.plans import Unfit


def plan_attention(module: Any) -> plans.Attention:
    """How timm's Swin `WindowAttention` computes, fused by timm or not."""
    children = module._modules
    _guard.check_no_dropout(children, "attn_drop")
    _guard.check_no_dropout(children, "proj_drop")
    qkv, proj = _attention.projections(module, module.num_heads, module.fused_attn)
    window = tuple(module.window_size)
    _as_built.expect(module, window_area=window[0] * window[1])
    _position.check_index(module, window)
    table = _guard.tensor(module, "relative_position_bias_table")
    if table is None:
        raise Unfit("it has no relative_position_bias_table")
    return plans.Attention(heads=module.num_heads, qkv=(qkv,), proj=proj, table=table)


class WindowAttention(Layer, swin_transformer.WindowAttention):
    """`timm.models.swin_transformer.WindowAttention` on `vitfast.ops.window_attention`.

    With a mask, which timm's block gives where it shifts, timm's forward: the drop-in block needs
    neither the mask nor this module's forward.
    """

    role = "attention"
    plan = staticmethod(plan_attention)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        out = _windowed.attend(self, x, mask, plan_attention)
        return super().forward(x, mask=mask) if out is None else out


class SwinTransformerBlock(Layer, swin_transformer.SwinTransformerBlock):
    """`timm.models.swin_transformer.SwinTransformerBlock`, its windows as index arithmetic."""

    role = "block"
    plan = staticmethod(_windowed.norms_first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = _windowed.run_block(self, x, _windowed.norms_first)
        return super().forward(x) if out is None else out


class PatchMerging(Layer, swin_transformer.PatchMerging):
    """`timm.models.swin_transformer.PatchMerging` on `vitfast.ops.patch_merge`."""

    plan = staticmethod(_patch_merging.norm_first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = _patch_merging.run(self, x, _patch_merging.norm_first)
        return super().forward(x) if out is None else out


_attention.PLANS |= {
    swin_transformer.WindowAttention: plan_attention,
    WindowAttention: plan_attention,
}
