"""Drop-ins for the partition attention of timm's MaxViT, and its ConvNeXt block."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import maxxvit
from torch import nn

from vitfast import plans
from vitfast.engine import memo
from vitfast.engine.eligibility import plan_call
from vitfast.layers import _attention, _block, _convnext, _guard, _mlp, _position, layer_scale
from vitfast.layers._base import Layer
from vitfast.plans import Unsupported


def plan_attention(module: Any) -> plans.Attention:
    """How timm's `AttentionCl` computes, fused by timm or not."""
    children = module._modules
    # Fused, timm looks at the mode of the attention, not at that of its dropout.
    mode = module.training if module.fused_attn else None
    _guard.check_no_dropout(children, "attn_drop", mode)
    _guard.check_no_dropout(children, "proj_drop")
    qkv, proj = _attention.projections(module, module.num_heads, module.fused_attn)
    return plans.Attention(
        heads=module.num_heads,
        qkv=(qkv,),
        proj=proj,
        head_first=module.head_first,
        table=_position.relative(module.rel_pos),
    )


def _takes(module: Any, window: tuple[int, int]) -> bool:
    """Whether the position bias of an `AttentionCl` is of windows of this size."""
    return module.rel_pos is None or tuple(module.rel_pos.window_size) == window


class AttentionCl(Layer, maxxvit.AttentionCl):
    """`timm.models.maxxvit.AttentionCl` of windows [windows, h, w, C]."""

    role = "attention"
    plan = staticmethod(plan_attention)

    def forward(self, x: torch.Tensor, shared_rel_pos: torch.Tensor | None = None) -> torch.Tensor:
        plan = plan_call(plan_attention, self, x) if shared_rel_pos is None else None
        if plan is None or x.ndim != 4 or not _takes(self, tuple(x.shape[1:3])):
            return super().forward(x, shared_rel_pos=shared_rel_pos)
        window = (x.shape[1], x.shape[2])
        out = _attention.attend(x.flatten(1, 2), plan, windows=plans.Windows(window, window))
        return out.unflatten(1, window)


class PartitionAttentionCl(Layer, maxxvit.PartitionAttentionCl):
    """`timm.models.maxxvit.PartitionAttentionCl`: its windows or grid as index arithmetic."""

    role = "block"
    plan = staticmethod(_block.with_layer_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = memo.recall_plan(_block.with_layer_scale, self, x)
        window = tuple(self.partition_size)
        if plan is None or x.ndim != 4:
            return super().forward(x)
        if not plan.attn_is_called and not _takes(self.attn, window):
            return super().forward(x)
        size = (x.shape[1], x.shape[2])
        if size[0] % window[0] or size[1] % window[1]:
            return super().forward(x)
        windows = plans.Windows(size, window, grid=not self.partition_block)
        out = _block.run(
            x.flatten(1, 2), plan, self, self._partition_attn, maps=(size, size), windows=windows
        )
        return out.unflatten(1, size)


def plan_convnext(module: Any) -> plans.ConvNeXtBlock:
    """How timm's `ConvNeXtBlock` of this file computes, with linear layers or 1x1 convolutions."""
    children = module._modules
    for name in ("shortcut", "down"):
        if type(children[name]) is not nn.Identity:
            raise Unsupported(f"its {name} pools or widens")
        _guard.check_bare(children[name], name)
    nchw = module.use_conv_mlp
    return _convnext.plan(
        lambda: (
            _convnext.depthwise(children, "conv_dw"),
            _convnext.norm(children, nchw),
        ),
        lambda: (
            _mlp.pointwise(children, "mlp"),
            layer_scale.child(children, "ls", nchw=nchw),
            _guard.drop_path(children, "drop_path"),
        ),
    )


class ConvNeXtBlock(Layer, maxxvit.ConvNeXtBlock):
    """`timm.models.maxxvit.ConvNeXtBlock`, where it neither strides nor widens."""

    role = "block"
    plan = staticmethod(plan_convnext)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = memo.recall_plan(plan_convnext, self, x)
        if plan is None or x.ndim != 4:
            return super().forward(x)
        return _convnext.run(x, plan, self, self.use_conv_mlp)


_attention.PLANS |= {maxxvit.AttentionCl: plan_attention, AttentionCl: plan_attention}
