"""Drop-ins for the window attention and block of timm's Swin Transformer."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import swin_transformer

from vitfast.layers import _attention, _block, _guard
from vitfast.layers._attention import Attention, Windows
from vitfast.layers._base import Layer


def plan_attention(module: Any) -> Attention:
    """How timm's Swin `WindowAttention` computes, fused by timm or not."""
    children = module._modules
    _guard.check_no_dropout(children, "attn_drop")
    _guard.check_no_dropout(children, "proj_drop")
    return Attention(
        heads=module.num_heads,
        qkv=(_guard.linear(children, "qkv"),),
        proj=_guard.linear(children, "proj"),
        table=_guard.tensor(module, "relative_position_bias_table"),
    )


class WindowAttention(Layer, swin_transformer.WindowAttention):
    """`timm.models.swin_transformer.WindowAttention` on `vitfast.ops.window_attention`.

    With a mask, which timm's block gives where it shifts, timm's forward: the drop-in block needs
    neither the mask nor this module's forward.
    """

    role = "attention"
    plan = staticmethod(plan_attention)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        plan = None if mask is not None else _guard.ready(plan_attention, self, x)
        if plan is None or x.ndim != 3 or x.shape[1] != self.window_area:
            return super().forward(x, mask=mask)
        return _attention.attend(x, plan, windows=Windows(self.window_size, self.window_size))


class SwinTransformerBlock(Layer, swin_transformer.SwinTransformerBlock):
    """`timm.models.swin_transformer.SwinTransformerBlock`, its windows as index arithmetic."""

    role = "block"
    plan = staticmethod(_block.without_layer_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = _guard.ready(_block.without_layer_scale, self, x)
        if plan is None or x.ndim != 4:
            return super().forward(x)
        size = (x.shape[1], x.shape[2])
        # timm cuts its mask for the size it was told, and works with no other.
        if any(self.shift_size) and not self.dynamic_mask and size != tuple(self.input_resolution):
            return super().forward(x)
        windows = Windows(size, tuple(self.window_size), tuple(self.shift_size))
        return _block.run(x.flatten(1, 2), plan, windows=windows).unflatten(1, size)


_attention.PLANS |= {
    swin_transformer.WindowAttention: plan_attention,
    WindowAttention: plan_attention,
}
