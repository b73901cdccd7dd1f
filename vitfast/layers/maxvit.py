"""Drop-ins for the partition attention of timm's MaxViT, and its ConvNeXt block."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import maxxvit
from torch import nn

from vitfast import plans
from vitfast.blocks.convnext import run_convnext_block
from vitfast.blocks.parts import attend
from vitfast.blocks.transformer import run_transformer_block
from vitfast.layers.base import CONVNEXT, WINDOWED_BLOCK, WINDOWS, Layer
from vitfast.layers.reading.attention import ATTENTION_PLANS, projections
from vitfast.layers.reading.block import (
    plan_convnext,
    plan_with_layer_scale,
    read_depthwise,
    read_norm_after_conv,
)
from vitfast.layers.reading.children import (
    check_bare,
    check_no_dropout,
    read_drop_path,
    read_layer_scale,
)
from vitfast.layers.reading.mlp import read_pointwise_mlp
from vitfast.layers.reading.position import read_relative_bias
from vitfast.plans import Unsupported


def plan_attention(module: Any) -> plans.Attention:
    """How timm's `AttentionCl` computes, fused by timm or not."""
    children = module._modules
    # Fused, timm looks at the mode of the attention, not at that of its dropout.
    mode = module.training if module.fused_attn else None
    check_no_dropout(children, "attn_drop", mode)
    check_no_dropout(children, "proj_drop")
    qkv, proj = projections(module, module.num_heads, module.fused_attn)
    return plans.Attention(
        heads=module.num_heads,
        qkv=(qkv,),
        proj=proj,
        head_first=module.head_first,
        table=read_relative_bias(module.rel_pos),
    )


def _takes(module: Any, window: tuple[int, int]) -> bool:
    """Whether the position bias of an `AttentionCl` is of windows of this size."""
    return module.rel_pos is None or tuple(module.rel_pos.window_size) == window


class AttentionCl(Layer, maxxvit.AttentionCl):
    """`timm.models.maxxvit.AttentionCl` of windows [windows, h, w, C]."""

    role = "attention"
    ops = WINDOWS
    plan = staticmethod(plan_attention)

    def forward(self, x: torch.Tensor, shared_rel_pos: torch.Tensor | None = None) -> torch.Tensor:
        plan = self._plan_call(x) if shared_rel_pos is None else None
        if plan is None or x.ndim != 4 or not _takes(self, tuple(x.shape[1:3])):
            return super().forward(x, shared_rel_pos=shared_rel_pos)
        window = (x.shape[1], x.shape[2])
        out = attend(x.flatten(1, 2), plan, windows=plans.Windows(window, window))
        return out.unflatten(1, window)


class PartitionAttentionCl(Layer, maxxvit.PartitionAttentionCl):
    """`timm.models.maxxvit.PartitionAttentionCl`: its windows or grid as index arithmetic."""

    role = "block"
    ops = WINDOWED_BLOCK
    plan = staticmethod(plan_with_layer_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._recall_plan(x)
        window = tuple(self.partition_size)
        if plan is None or x.ndim != 4:
            return super().forward(x)
        if not plan.attn_is_called and not _takes(self.attn, window):
            return super().forward(x)
        size = (x.shape[1], x.shape[2])
        if size[0] % window[0] or size[1] % window[1]:
            return super().forward(x)
        windows = plans.Windows(size, window, grid=not self.partition_block)
        out = run_transformer_block(
            x.flatten(1, 2), plan, self, self._partition_attn, maps=(size, size), windows=windows
        )
        return out.unflatten(1, size)


def plan_convnext_block(module: Any) -> plans.ConvNeXtBlock:
    """How timm's `ConvNeXtBlock` of this file computes, with linear layers or 1x1 convolutions."""
    children = module._modules
    for name in ("shortcut", "down"):
        if type(children[name]) is not nn.Identity:
            raise Unsupported(f"its {name} pools or widens")
        check_bare(children[name], name)
    nchw = module.use_conv_mlp
    return plan_convnext(
        lambda: (
            read_depthwise(children, "conv_dw"),
            read_norm_after_conv(children, nchw),
        ),
        lambda: (
            read_pointwise_mlp(children, "mlp"),
            read_layer_scale(children, "ls", nchw=nchw),
            read_drop_path(children, "drop_path"),
        ),
    )


class ConvNeXtBlock(Layer, maxxvit.ConvNeXtBlock):
    """`timm.models.maxxvit.ConvNeXtBlock`, where it neither strides nor widens."""

    role = "block"
    ops = CONVNEXT
    plan = staticmethod(plan_convnext_block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._recall_plan(x)
        if plan is None or x.ndim != 4:
            return super().forward(x)
        return run_convnext_block(x, plan, self, self.use_conv_mlp)


ATTENTION_PLANS[maxxvit.AttentionCl] = plan_attention
