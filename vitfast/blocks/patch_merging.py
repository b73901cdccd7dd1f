"""What the downsampling between the stages of Swin and Swin V2 shares."""

from __future__ import annotations

from typing import Any

import torch

from vitfast import ops
from vitfast.blocks.launched import through_list
from vitfast.blocks.parts import apply_norm, operand_dtype
from vitfast.engine import patches as engine
from vitfast.engine.eligibility import takes_engine
from vitfast.plans import PatchMerging


def run_patch_merging(module: Any, x: torch.Tensor) -> torch.Tensor | None:
    """The drop-in on a map x [B, H, W, C]; None where it is for timm's forward."""
    merge: PatchMerging | None = module._recall_plan(x)
    if merge is None or x.ndim != 4:
        return None
    if takes_engine(x, merge):
        out = engine.merge(x, merge)
        if out is not None:
            return out
    return through_list(_differentiable, x, merge)


def _differentiable(x: torch.Tensor, merge: PatchMerging) -> torch.Tensor:
    """Through the public ops: autograd, torch.compile and any backend."""
    norm = merge.norm
    if merge.norm_last:
        return apply_norm(ops.linear_act(ops.patch_merge(x, norm=None), *merge.reduction), norm)
    merged = ops.patch_merge(
        x, norm.weight, norm.bias, norm.eps, norm=norm.kind, out_dtype=operand_dtype(x)
    )
    return ops.linear_act(merged, *merge.reduction)
