"""What the downsampling between the stages of Swin and Swin V2 shares."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from vitfast import ops
from vitfast.engine import memo
from vitfast.engine import patches as engine
from vitfast.engine.eligibility import records_grad
from vitfast.layers import _block, _guard, _norm
from vitfast.plans import PatchMerging


def norm_first(module: nn.Module) -> PatchMerging:
    """How timm's `PatchMerging` of Swin computes."""
    children = module._modules
    return PatchMerging(_guard.linear(children, "reduction"), _norm.child(children, "norm"), False)


def norm_last(module: nn.Module) -> PatchMerging:
    """How timm's `PatchMerging` of Swin V2 computes."""
    return norm_first(module)._replace(norm_last=True)


def run(
    module: nn.Module, x: torch.Tensor, plan: Callable[[nn.Module], PatchMerging]
) -> torch.Tensor | None:
    """The layer on a map x [B, H, W, C]; None where it is for timm's forward."""
    merge = memo.recall_plan(plan, module, x)
    if merge is None or x.ndim != 4:
        return None
    if not torch.compiler.is_compiling() and not records_grad(
        x, *merge.reduction, merge.norm.weight, merge.norm.bias
    ):
        out = engine.merge(x, merge)
        if out is not None:
            return out
    norm = merge.norm
    if merge.norm_last:
        return _norm.apply(ops.linear_act(ops.patch_merge(x, norm=None), *merge.reduction), norm)
    merged = ops.patch_merge(
        x, norm.weight, norm.bias, norm.eps, norm=norm.kind, out_dtype=_block.operand_dtype(x)
    )
    return ops.linear_act(merged, *merge.reduction)
