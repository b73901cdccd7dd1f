"""Drop-ins for the stages of Swin, Swin V2 and ConvNeXt: a downsampling, and blocks in turn."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import convnext, swin_transformer, swin_transformer_v2
from torch import nn

from vitfast.blocks.in_turn import in_turn, is_worthwhile
from vitfast.layers.base import Layer
from vitfast.layers.reading.children import TIMM_CLASSES, check_bare
from vitfast.plans import Unfit

_CONTAINERS = (nn.Sequential, nn.ModuleList)


def plan_stage(stage: Any) -> tuple[()]:
    """That timm's forward of a stage would call its downsampling and its blocks, and nobody would
    see more of it."""
    blocks = stage._modules["blocks"]
    if type(blocks) not in _CONTAINERS:
        raise Unfit(f"blocks is a {type(blocks).__name__}")
    check_bare(blocks, "blocks")
    return ()


def run_stage(stage: Any, x: torch.Tensor) -> torch.Tensor | None:
    """What timm's forward of a stage computes, in the memory of two maps at most; None where that
    has to run."""
    if not is_worthwhile(x) or stage.grad_checkpointing or stage._plan_call(x) is None:
        return None
    return in_turn((stage.downsample, *stage.blocks), x, TIMM_CLASSES)


class SwinTransformerStage(Layer, swin_transformer.SwinTransformerStage):
    """`timm.models.swin_transformer.SwinTransformerStage`, its blocks in each other's memory."""

    plan = staticmethod(plan_stage)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = run_stage(self, x)
        return self._as_timm(x) if out is None else out


class SwinTransformerV2Stage(Layer, swin_transformer_v2.SwinTransformerV2Stage):
    """`timm.models.swin_transformer_v2.SwinTransformerV2Stage`, as `SwinTransformerStage`."""

    plan = staticmethod(plan_stage)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = run_stage(self, x)
        return self._as_timm(x) if out is None else out


class ConvNeXtStage(Layer, convnext.ConvNeXtStage):
    """`timm.models.convnext.ConvNeXtStage`, as `SwinTransformerStage`."""

    plan = staticmethod(plan_stage)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = run_stage(self, x)
        return self._as_timm(x) if out is None else out
