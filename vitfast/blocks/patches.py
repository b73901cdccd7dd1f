"""Stems and downsamplings: a convolution of disjoint patches and a norm, in either order."""

from __future__ import annotations

import torch

from vitfast import ops
from vitfast.blocks.launched import through_list
from vitfast.blocks.parts import apply_norm, norm_2d_dtype, operand_dtype
from vitfast.engine import patches as engine
from vitfast.engine.eligibility import takes_engine
from vitfast.plans import Patches
from vitfast.runtime.library import autocast_dtype


def run_patches(x: torch.Tensor, plan: Patches) -> torch.Tensor:
    """Tokens [B, N, C'] of a map x [B, C, H, W], of which every pixel lies in a patch."""
    tokens = _on_engine(x, plan)
    return through_list(_differentiable, x, plan) if tokens is None else tokens


def _on_engine(x: torch.Tensor, plan: Patches) -> torch.Tensor | None:
    """In inference on the CPU; None elsewhere, and for what the engine hands back."""
    if not takes_engine(x, plan):
        return None
    if plan.norm_first:
        return engine.downsample(x.permute(0, 2, 3, 1), plan)
    operand = autocast_dtype(x.device) or x.dtype
    if norm_2d_dtype(operand, plan.norm) not in (None, operand):
        return None
    return engine.embed(x, *plan.projection, plan.norm)


def _differentiable(x: torch.Tensor, plan: Patches) -> torch.Tensor:
    """Through the public ops: autograd, torch.compile and any backend."""
    if not plan.norm_first:
        tokens = ops.patch_embed(x, *plan.projection)
        return apply_norm(tokens, plan.norm, norm_2d_dtype(tokens.dtype, plan.norm))
    normed = apply_norm(x.permute(0, 2, 3, 1), plan.norm, operand_dtype(x))
    return ops.patch_embed(normed.permute(0, 3, 1, 2), *plan.projection)
