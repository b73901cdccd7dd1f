"""Drop-ins for the two blocks of timm's RDNet: ConvNeXt's branch, without its residual add."""

from __future__ import annotations

import torch
from timm.models import rdnet
from torch import nn

from vitfast import plans
from vitfast.engine import memo
from vitfast.layers import _convnext, _guard, _norm
from vitfast.layers._base import Layer
from vitfast.plans import Unsupported


def plan_block(module: nn.Module) -> plans.ConvNeXtBlock:
    """How timm's `Block`, and `BlockESE` but for its last layer, computes."""
    layers = module._modules["layers"]
    order = "012345" if isinstance(module, rdnet.BlockESE) else "01234"
    if type(layers) is not nn.Sequential or list(layers._modules) != list(order):
        raise Unsupported("its layers are in another order")
    _guard.check_bare(layers, "layers")
    children = layers._modules
    return plans.ConvNeXtBlock(
        conv=_convnext.depthwise(children, "0"),
        norm=_norm.child_2d(children, "1"),
        mlp=plans.Mlp(
            fc1=_guard.linear(children, "2", pointwise=True),
            act=_guard.activation(children, "3"),
            fc2=_guard.linear(children, "4", pointwise=True),
            norm=None,
        ),
        gamma=None,
        drop=None,
    )


class Block(Layer, rdnet.Block):
    """`timm.models.rdnet.Block`: convolution and norm in one pass; channels-last out."""

    role = "block"
    plan = staticmethod(plan_block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = memo.recall_plan(plan_block, self, x)
        return super().forward(x) if plan is None or x.ndim != 4 else _convnext.run_branch(x, plan)


class BlockESE(Layer, rdnet.BlockESE):
    """`timm.models.rdnet.BlockESE`: as `Block`, then timm's squeeze and excitation."""

    role = "block"
    plan = staticmethod(plan_block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = memo.recall_plan(plan_block, self, x)
        if plan is None or x.ndim != 4:
            return super().forward(x)
        return self.layers[5](_convnext.run_branch(x, plan))
