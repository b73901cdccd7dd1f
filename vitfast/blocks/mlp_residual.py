"""The end of a block whose mixer and norm are timm's: an MLP and the residual add, channels last.

x + drop_path(gamma * mlp(y))
"""

from __future__ import annotations

import torch

from vitfast.blocks.launched import through_list
from vitfast.blocks.parts import add_residual, apply_mlp
from vitfast.engine import convnext as engine
from vitfast.engine.eligibility import takes_engine
from vitfast.plans import MlpResidual


def run_mlp_residual(x: torch.Tensor, y: torch.Tensor, plan: MlpResidual) -> torch.Tensor:
    """The tail on maps x and y [B, C, H, W] of any strides; the result is channels-last."""
    base, inner = x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1)
    out = None
    if takes_engine(base, plan, inner):
        out = engine.mlp_residual(base, inner, plan)
    if out is None:
        out = through_list(_differentiable, base, plan, inner)
    return out.permute(0, 3, 1, 2)


def _differentiable(x: torch.Tensor, plan: MlpResidual, y: torch.Tensor) -> torch.Tensor:
    """Through the public ops, on rows [B, H, W, C]: autograd, torch.compile and any backend."""
    return add_residual(x, apply_mlp(y, plan.mlp), plan.gamma, plan.drop)
