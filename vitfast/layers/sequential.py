"""Drop-in for what is a torch Sequential in timm: a stem, a downsampling, stages or blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitfast import plans
from vitfast.blocks.in_turn import in_turn, is_worthwhile
from vitfast.blocks.patches import run_patches
from vitfast.engine import donation
from vitfast.layers.base import Layer
from vitfast.layers.block import Block
from vitfast.layers.reading.children import TIMM_CLASSES
from vitfast.layers.reading.conv import plan_projection
from vitfast.layers.reading.norm import read_norm_2d
from vitfast.layers.stage import ConvNeXtStage, SwinTransformerStage, SwinTransformerV2Stage
from vitfast.plans import Unsupported

_LINKS = (Block, ConvNeXtStage, SwinTransformerStage, SwinTransformerV2Stage)
_LINK_CLASSES = {*_LINKS, *(kind.timm_class for kind in _LINKS)}


def is_chain(module: nn.Module) -> bool:
    """Whether a module holds nothing but stages or ViT blocks, swapped or not."""
    children = module._modules.values()
    return len(children) > 0 and all(type(child) in _LINK_CLASSES for child in children)


def run_chain(chain: Any, x: torch.Tensor) -> torch.Tensor | None:
    """Stages or blocks one after the other; None where timm's forward has to run.

    The result's memory is no larger than itself: a stage may have written it into that of a map
    which was four times as large. What a hook or module of others made is returned as it is.
    """
    if not is_worthwhile(x) or chain._plan_call(x) is None:
        return None
    out = in_turn(chain, x, TIMM_CLASSES)
    is_part = donation.is_made(out) and out.untyped_storage().nbytes() > out.nbytes
    return out.clone() if is_part else out


def plan_sequential(module: nn.Module) -> plans.Patches | tuple[()]:
    """Which of two modules is the convolution, and which the norm; nothing of a chain."""
    children = module._modules
    if is_chain(module):
        return ()
    kinds = [type(child) for child in children.values()]
    if len(kinds) != 2 or nn.Conv2d not in kinds:
        raise Unsupported("not a norm and a convolution")
    norm_first = kinds[1] is nn.Conv2d
    norm, conv = children if norm_first else reversed(children)
    if children[conv].kernel_size == (1, 1):
        raise Unsupported("its convolution is a linear layer")
    return plans.Patches(plan_projection(module, conv), read_norm_2d(children, norm), norm_first)


class Sequential(Layer, nn.Sequential):
    """`torch.nn.Sequential` of a LayerNorm2d and a convolution of disjoint patches, in any order.

    ConvNeXt's stem and downsampling, on `vitfast.ops.patch_embed`; channels-last out. And that of
    ViT's blocks, or of the stages of Swin, Swin V2 and ConvNeXt, each of which writes to the memory
    of the one before.
    """

    ops = ("layer_norm", "patch_embed", "rms_norm")
    by_shape = True
    plan = staticmethod(plan_sequential)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if is_chain(self):
            out = run_chain(self, x)
            return self._as_timm(x) if out is None else out
        plan = self._recall_plan(x)
        if plan is None or x.ndim != 4:
            return super().forward(x)
        height, width = plan.projection.weight.shape[2:]
        rows, columns = x.shape[2] // height, x.shape[3] // width
        if rows == 0 or columns == 0 or not x.is_floating_point():
            return super().forward(x)
        x = x[..., : rows * height, : columns * width]
        return run_patches(x, plan).unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
