"""Drop-in for the convolutional block of timm's EdgeNeXt."""

from __future__ import annotations

import torch
from timm.models import edgenext
from torch import nn

from vitfast import plans
from vitfast.blocks.convnext import run_convnext_block
from vitfast.layers.base import CONVNEXT, Layer
from vitfast.layers.reading.block import (
    plan_convnext,
    read_depthwise,
    read_known,
    read_norm_after_conv,
)
from vitfast.layers.reading.children import read_drop_path, read_optional_parameter
from vitfast.layers.reading.mlp import read_mlp
from vitfast.plans import Unsupported


def plan_block(module: nn.Module) -> plans.ConvNeXtBlock:
    """How timm's `ConvBlock` computes: ConvNeXt's block, with other kernels."""
    children = module._modules
    if module.shortcut_after_dw:
        raise Unsupported("its shortcut leaves after the convolution, which strides or widens")
    return plan_convnext(
        lambda: (
            read_depthwise(children, "conv_dw"),
            read_norm_after_conv(children),
        ),
        lambda: (
            read_known(read_mlp, children, "mlp"),
            read_optional_parameter(module, "gamma"),
            read_drop_path(children, "drop_path"),
        ),
    )


class ConvBlock(Layer, edgenext.ConvBlock):
    """`timm.models.edgenext.ConvBlock`: convolution and norm in one pass; channels-last out."""

    role = "block"
    ops = CONVNEXT
    plan = staticmethod(plan_block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._recall_plan(x)
        return (
            super().forward(x) if plan is None or x.ndim != 4 else run_convnext_block(x, plan, self)
        )
