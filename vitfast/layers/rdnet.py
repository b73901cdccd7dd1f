"""Drop-ins for the two blocks of timm's RDNet: ConvNeXt's branch, without its residual add."""

from __future__ import annotations

import torch
from timm.models import rdnet
from torch import nn

from vitfast import plans
from vitfast.blocks.convnext import run_convnext_branch
from vitfast.layers.base import CONVNEXT, Layer
from vitfast.layers.reading.block import read_depthwise
from vitfast.layers.reading.children import check_bare, read_activation, read_linear
from vitfast.layers.reading.norm import read_norm_2d
from vitfast.plans import Unsupported


def plan_block(module: nn.Module) -> plans.ConvNeXtBlock:
    """How timm's `Block`, and `BlockESE` but for its last layer, computes."""
    layers = module._modules["layers"]
    order = "012345" if isinstance(module, rdnet.BlockESE) else "01234"
    if type(layers) is not nn.Sequential or list(layers._modules) != list(order):
        raise Unsupported("its layers are in another order")
    check_bare(layers, "layers")
    children = layers._modules
    return plans.ConvNeXtBlock(
        conv=read_depthwise(children, "0"),
        norm=read_norm_2d(children, "1"),
        mlp=plans.Mlp(
            fc1=read_linear(children, "2", pointwise=True),
            act=read_activation(children, "3"),
            fc2=read_linear(children, "4", pointwise=True),
            norm=None,
        ),
        gamma=None,
        drop=None,
    )


class Block(Layer, rdnet.Block):
    """`timm.models.rdnet.Block`: convolution and norm in one pass; channels-last out."""

    role = "block"
    ops = CONVNEXT
    plan = staticmethod(plan_block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._recall_plan(x)
        return super().forward(x) if plan is None or x.ndim != 4 else run_convnext_branch(x, plan)


class BlockESE(Layer, rdnet.BlockESE):
    """`timm.models.rdnet.BlockESE`: as `Block`, then timm's squeeze and excitation."""

    role = "block"
    ops = CONVNEXT
    plan = staticmethod(plan_block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._recall_plan(x)
        if plan is None or x.ndim != 4:
            return super().forward(x)
        return self.layers[5](run_convnext_branch(x, plan))
