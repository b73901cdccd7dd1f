"""Drop-ins for the parts of timm's Swin Transformer V2."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import swin_transformer_v2

from vitfast import plans
from vitfast.layers import _attention, _guard, _patch_merging, _position, _windowed
from vitfast.layers._base import Layer
from vitfast.plans import Unfit


def plan_attention(module: Any) -> plans.Attention:
    """How timm's Swin V2 `WindowAttention` computes."""
    children = module._modules
    _guard.check_no_dropout(children, "attn_drop")
    _guard.check_no_dropout(children, "proj_drop")
    qkv, proj = _attention.projections(module, module.num_heads, True)
    logit_scale = _guard.tensor(module, "logit_scale")
    if logit_scale.shape != (module.num_heads, 1, 1):
        raise Unfit(f"logit_scale has shape {tuple(logit_scale.shape)}")
    _attention.check_softmax(children)
    _position.check_index(module, tuple(module.window_size))
    return plans.Attention(
        heads=module.num_heads,
        qkv=(qkv._replace(bias=_attention.packed_bias(module)),),
        proj=proj,
        table=_position.table(module.cpb_mlp, module.relative_coords_table, module.num_heads),
        logit_scale=logit_scale.flatten(),
    )


class WindowAttention(Layer, swin_transformer_v2.WindowAttention):
    """`timm.models.swin_transformer_v2.WindowAttention`, as that of Swin."""

    role = "attention"
    plan = staticmethod(plan_attention)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        out = _windowed.attend(self, x, mask, plan_attention)
        return super().forward(x, mask=mask) if out is None else out


class SwinTransformerV2Block(Layer, swin_transformer_v2.SwinTransformerV2Block):
    """`timm.models.swin_transformer_v2.SwinTransformerV2Block`, as `SwinTransformerBlock`."""

    role = "block"
    plan = staticmethod(_windowed.norms_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = _windowed.run_block(self, x, _windowed.norms_last)
        return super().forward(x) if out is None else out


class PatchMerging(Layer, swin_transformer_v2.PatchMerging):
    """`timm.models.swin_transformer_v2.PatchMerging` on `vitfast.ops.patch_merge`."""

    plan = staticmethod(_patch_merging.norm_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = _patch_merging.run(self, x, _patch_merging.norm_last)
        return super().forward(x) if out is None else out


_attention.PLANS |= {
    swin_transformer_v2.WindowAttention: plan_attention,
    WindowAttention: plan_attention,
}
