"""Drop-in for the block of timm's ConvNeXt."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm import layers as timm_layers
from timm.models import convnext
from torch import nn

from vitfast import plans
from vitfast.blocks.convnext import run_convnext_block
from vitfast.layers.base import CONVNEXT, Layer
from vitfast.layers.reading.block import plan_convnext, read_depthwise, read_norm_after_conv
from vitfast.layers.reading.children import (
    Children,
    check_bare,
    read_drop_path,
    read_optional_parameter,
)
from vitfast.layers.reading.mlp import read_pointwise_mlp
from vitfast.plans import Unsupported


def plan_block(module: nn.Module) -> plans.ConvNeXtBlock:
    """How timm's `ConvNeXtBlock` computes, with linear layers or 1x1 convolutions."""
    children = module._modules
    if type(children["shortcut"]) is not nn.Identity:
        raise Unsupported("its shortcut pools or widens")
    check_bare(children["shortcut"], "shortcut")
    return plan_convnext(
        lambda: (
            read_depthwise(children, "conv_dw"),
            _plan_norm(children["norm"], children, module.use_conv_mlp),
        ),
        lambda: (
            read_pointwise_mlp(children, "mlp"),
            read_optional_parameter(module, "gamma"),
            read_drop_path(children, "drop_path"),
        ),
    )


def _plan_norm(
    module: nn.Module, children: Children, over_nchw: bool
) -> plans.Norm | Callable[[torch.Tensor], torch.Tensor]:
    if type(module) is timm_layers.SimpleNorm:
        return module
    if type(module) is timm_layers.SimpleNorm2d:
        return lambda x: module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return read_norm_after_conv(children, over_nchw)


class ConvNeXtBlock(Layer, convnext.ConvNeXtBlock):
    """`timm.models.convnext.ConvNeXtBlock`: convolution and norm in one pass, channels last."""

    role = "block"
    ops = CONVNEXT
    plan = staticmethod(plan_block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._recall_plan(x)
        if plan is None or x.ndim != 4:
            return super().forward(x)
        return run_convnext_block(x, plan, self, self.use_conv_mlp)
