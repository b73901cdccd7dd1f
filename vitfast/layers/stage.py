"""Drop-ins for the stages of Swin, Swin V2 and ConvNeXt: a downsampling, and blocks in turn."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import convnext, swin_transformer, swin_transformer_v2
from torch import nn

from vitfast.blocks.in_turn import in_turn, is_seen, is_worthwhile
from vitfast.layers.base import Layer

_CONTAINERS = (nn.Sequential, nn.ModuleList)


def run_stage(stage: Any, x: torch.Tensor) -> torch.Tensor | None:
    """What timm's forward of a stage computes, in the memory of two maps at most; None where that
    has to run."""
    blocks = stage.blocks
    if not is_worthwhile(x) or stage.grad_checkpointing:
        return None
    if type(blocks) not in _CONTAINERS or is_seen(blocks):
        return None
    return in_turn((stage.downsample, *blocks), x, Layer)


class SwinTransformerStage(Layer, swin_transformer.SwinTransformerStage):
    """`timm.models.swin_transformer.SwinTransformerStage`, its blocks in each other's memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = run_stage(self, x)
        return super().forward(x) if out is None else out


class SwinTransformerV2Stage(Layer, swin_transformer_v2.SwinTransformerV2Stage):
    """`timm.models.swin_transformer_v2.SwinTransformerV2Stage`, as `SwinTransformerStage`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = run_stage(self, x)
        return super().forward(x) if out is None else out


class ConvNeXtStage(Layer, convnext.ConvNeXtStage):
    """`timm.models.convnext.ConvNeXtStage`, as `SwinTransformerStage`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = run_stage(self, x)
        return super().forward(x) if out is None else out


_STAGES = (SwinTransformerStage, SwinTransformerV2Stage, ConvNeXtStage)
_KINDS = {*_STAGES, *(kind.timm_class for kind in _STAGES)}


def is_stage(module: object) -> bool:
    """Whether a module is one of these stages, swapped or not."""
    return type(module) in _KINDS


def run_stages(stages: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """Stages one after the other. The result's memory is no larger than itself: a stage may have
    written it into that of a map which was four times as large."""
    out = in_turn(stages, x, Layer)
    return out.clone() if out.untyped_storage().nbytes() > out.nbytes else out
