"""Drop-in for the stems and downsamplings that are a torch Sequential of two modules."""

from __future__ import annotations

import torch
from torch import nn

from vitfast import ops, plans
from vitfast.engine import memo
from vitfast.engine import patches as engine
from vitfast.engine.eligibility import records_grad
from vitfast.layers import _block, _norm, patch_embed
from vitfast.layers._base import Layer
from vitfast.plans import Unsupported
from vitfast.runtime.library import autocast_dtype


def plan_patches(module: nn.Module) -> plans.Patches:
    """Which of a Sequential's two modules is the convolution, and which the norm."""
    children = module._modules
    kinds = [type(child) for child in children.values()]
    if len(kinds) != 2 or nn.Conv2d not in kinds:
        raise Unsupported("not a norm and a convolution")
    norm_first = kinds[1] is nn.Conv2d
    norm, conv = children if norm_first else reversed(children)
    if children[conv].kernel_size == (1, 1):
        raise Unsupported("its convolution is a linear layer")
    return plans.Patches(
        patch_embed.plan_projection(module, conv), _norm.child_2d(children, norm), norm_first
    )


class Sequential(Layer, nn.Sequential):
    """`torch.nn.Sequential` of a LayerNorm2d and a convolution of disjoint patches, in any order.

    ConvNeXt's stem and downsampling, on `vitfast.ops.patch_embed`; channels-last out.
    """

    by_shape = True
    plan = staticmethod(plan_patches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = memo.recall_plan(plan_patches, self, x)
        if plan is None or x.ndim != 4:
            return super().forward(x)
        height, width = plan.projection.weight.shape[2:]
        rows, columns = x.shape[2] // height, x.shape[3] // width
        if rows == 0 or columns == 0 or not x.is_floating_point():
            return super().forward(x)
        x = x[..., : rows * height, : columns * width]
        tokens = _fused(x, plan)
        if tokens is None:
            tokens = _differentiable(x, plan)
        return tokens.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)


def _fused(x: torch.Tensor, plan: plans.Patches) -> torch.Tensor | None:
    """In inference on the CPU; elsewhere None."""
    if torch.compiler.is_compiling() or records_grad(*plans.tensors_in((x, plan))):
        return None
    if plan.norm_first:
        return engine.downsample(x.permute(0, 2, 3, 1), plan)
    operand = autocast_dtype(x.device) or x.dtype
    if _norm.dtype_2d(operand, plan.norm) not in (None, operand):
        return None
    return engine.embed(x, *plan.projection, plan.norm)


def _differentiable(x: torch.Tensor, plan: plans.Patches) -> torch.Tensor:
    if not plan.norm_first:
        tokens = ops.patch_embed(x, *plan.projection)
        return _norm.apply(tokens, plan.norm, _norm.dtype_2d(tokens.dtype, plan.norm))
    normed = _norm.apply(x.permute(0, 2, 3, 1), plan.norm, _block.operand_dtype(x))
    return ops.patch_embed(normed.permute(0, 3, 1, 2), *plan.projection)
