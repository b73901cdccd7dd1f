"""Drop-in for the block of timm's ConvNeXt."""

from __future__ import annotations

import torch
from timm.models import convnext
from torch import nn

from vitfast.layers import _convnext, _guard, _mlp, _norm
from vitfast.layers._base import Layer
from vitfast.layers._convnext import ConvNeXt
from vitfast.layers._guard import Unsupported


def plan_block(module: nn.Module) -> ConvNeXt:
    """How timm's `ConvNeXtBlock` computes, with linear layers or 1x1 convolutions."""
    children = module._modules
    if type(children["shortcut"]) is not nn.Identity:
        raise Unsupported("its shortcut pools or widens")
    _guard.check_bare(children["shortcut"], "shortcut")
    norm = _norm.child_2d if module.use_conv_mlp else _norm.child
    return ConvNeXt(
        conv=_convnext.depthwise(children, "conv_dw"),
        norm=norm(children, "norm"),
        mlp=_mlp.pointwise(children, "mlp"),
        gamma=_guard.optional_parameter(module, "gamma"),
        drop=_guard.drop_path(children, "drop_path"),
    )


class ConvNeXtBlock(Layer, convnext.ConvNeXtBlock):
    """`timm.models.convnext.ConvNeXtBlock`: convolution and norm in one pass, channels last."""

    role = "block"
    plan = staticmethod(plan_block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = _guard.ready(plan_block, self, x)
        return super().forward(x) if plan is None or x.ndim != 4 else _convnext.run(x, plan)
