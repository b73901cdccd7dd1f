"""Stems and downsamplings: a convolution of disjoint patches and a norm, in either order."""

from __future__ import annotations

import torch

from vitfast import ops, plans
from vitfast.blocks.parts import apply_norm, norm_2d_dtype, operand_dtype
from vitfast.engine import patches as engine
from vitfast.engine.eligibility import takes_engine
from vitfast.runtime.library import autocast_dtype


def _fused(x: torch.Tensor, plan: plans.Patches) -> torch.Tensor | None:
    """In inference on the CPU; elsewhere None."""
    if not takes_engine(x, plan):
        return None
    if plan.norm_first:
        return engine.downsample(x.permute(0, 2, 3, 1), plan)
    operand = autocast_dtype(x.device) or x.dtype
    if norm_2d_dtype(operand, plan.norm) not in (None, operand):
        return None
    return engine.embed(x, *plan.projection, plan.norm)


def _differentiable(x: torch.Tensor, plan: plans.Patches) -> torch.Tensor:
    if not plan.norm_first:
        tokens = ops.patch_embed(x, *plan.projection)
        return apply_norm(tokens, plan.norm, norm_2d_dtype(tokens.dtype, plan.norm))
    normed = apply_norm(x.permute(0, 2, 3, 1), plan.norm, operand_dtype(x))
    return ops.patch_embed(normed.permute(0, 3, 1, 2), *plan.projection)
