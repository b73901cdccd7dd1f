"""Drop-in for the block of timm's InceptionNeXt."""

from __future__ import annotations

import torch
from timm.models import inception_next
from torch import nn

from vitfast import plans
from vitfast.blocks.mlp_residual import run_mlp_residual
from vitfast.engine.eligibility import records_grad
from vitfast.layers.base import MLP, Layer
from vitfast.layers.mlp import plan_conv_mlp
from vitfast.layers.reading.children import expect_vector, read_drop_path, read_optional_parameter
from vitfast.layers.reading.mlp import POINTWISE_MLP_PLANS, read_pointwise_mlp


def plan_block(module: nn.Module) -> plans.MlpResidual:
    """How timm's `MetaNeXtBlock` computes after its mixer and norm, which are timm's."""
    children = module._modules
    mlp = read_pointwise_mlp(children, "mlp")
    gamma = read_optional_parameter(module, "gamma")
    return plans.MlpResidual(
        mlp=mlp,
        gamma=expect_vector(gamma, len(mlp.fc2.weight), "gamma"),
        drop=read_drop_path(children, "drop_path"),
    )


class MetaNeXtBlock(Layer, inception_next.MetaNeXtBlock):
    """`timm.models.inception_next.MetaNeXtBlock`: mixer and norm as timm's; channels-last out.

    In training timm's forward: torch's BatchNorm and narrow convolutions go backward over
    channels-last maps so slowly that the MLP's gain is lost.
    """

    role = "block"
    ops = ("residual_add", *MLP)
    plan = staticmethod(plan_block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._recall_plan(x)
        if plan is None or x.ndim != 4 or plan.drops or records_grad(x, plan):
            return super().forward(x)
        return run_mlp_residual(x, self.norm(self.token_mixer(x)), plan)


POINTWISE_MLP_PLANS[inception_next.ConvMlp] = plan_conv_mlp
