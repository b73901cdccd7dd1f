"""Drop-in for the convolutional block of timm's EdgeNeXt."""

from __future__ import annotations

import torch
from timm.models import edgenext
from torch import nn

from vitfast import plans
from vitfast.engine import memo
from vitfast.layers import _convnext, _guard, _mlp
from vitfast.layers._base import Layer
from vitfast.plans import Unsupported


def plan_block(module: nn.Module) -> plans.ConvNeXtBlock:
    """How timm's `ConvBlock` computes: ConvNeXt's block, with other kernels."""
    children = module._modules
    if module.shortcut_after_dw:
        raise Unsupported("its shortcut leaves after the convolution, which strides or widens")
    return _convnext.plan(
        lambda: (
            _convnext.depthwise(children, "conv_dw"),
            _convnext.norm(children),
        ),
        lambda: (
            _convnext.child(_mlp.child, children, "mlp"),
            _guard.optional_parameter(module, "gamma"),
            _guard.drop_path(children, "drop_path"),
        ),
    )


class ConvBlock(Layer, edgenext.ConvBlock):
    """`timm.models.edgenext.ConvBlock`: convolution and norm in one pass; channels-last out."""

    role = "block"
    plan = staticmethod(plan_block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = memo.recall_plan(plan_block, self, x)
        return super().forward(x) if plan is None or x.ndim != 4 else _convnext.run(x, plan, self)
