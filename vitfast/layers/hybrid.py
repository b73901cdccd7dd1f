"""Drop-in for timm's HybridEmbed: a convolutional stem, and its projection to tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm import layers as timm_layers
from timm.layers import Format
from torch import nn

from vitfast import ops, plans
from vitfast.engine.products import conv as conv_product
from vitfast.layers import stem
from vitfast.layers.base import Layer
from vitfast.layers.reading.children import check_bare
from vitfast.layers.reading.conv import plan_projection


def plan_stem(module: Any) -> plans.HybridStem:
    """The projection of what the backbone gives."""
    children = module._modules
    if type(children["proj"]) is nn.Identity:
        check_bare(children["proj"], "proj")
        return plans.HybridStem(None)
    return plans.HybridStem(plan_projection(module))


def _project(x: torch.Tensor, plan: plans.Projection) -> torch.Tensor:
    """A map [B, C, H, W], a multiple of the patch, to tokens [B, N, C']."""
    weight, bias = plan
    size = weight.shape[2], weight.shape[3]
    if conv_product.channels_last(x) and x.numel() > 0:
        conv = plans.Conv(weight, bias, size, (0, 0), (1, 1), 1, None, False)
        kind = conv_product.direct(x)
        packed = conv_product.prepare_fitting(kind, conv, x.shape[1]) if kind is not None else None
        if kind is not None and packed is not None:
            return packed(x.to(kind.dtype)).permute(0, 2, 3, 1).flatten(1, 2)
    if size == (1, 1):
        return ops.linear_act(x.flatten(2).transpose(1, 2), weight.flatten(1), bias)
    return ops.patch_embed(x, weight, bias)


class HybridEmbed(Layer, timm_layers.HybridEmbed):
    """`timm.layers.HybridEmbed`, whose backbone gets its images channels-last.

    The backbone is called as it is, its parts swapped one by one; but for the beginning of a
    ResNetV2 in inference on the CPU. Tokens come out contiguous.
    """

    ops = ("linear_act", "patch_embed")
    plan = staticmethod(plan_stem)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._plan_call(x)
        if plan is None or x.ndim != 4:
            return super().forward(x)
        projection = plan.projection
        x = stem.features(self.backbone, x)
        if isinstance(x, (list, tuple)):
            x = x[-1]
        height, width = (1, 1) if projection is None else projection.weight.shape[-2:]
        if self.dynamic_img_pad:
            rows, columns = self.patch_size
            x = F.pad(x, (0, -x.shape[-1] % columns, 0, -x.shape[-2] % rows))
        rows, columns = x.shape[-2] // height, x.shape[-1] // width
        if (
            not (self.flatten or self.output_fmt in (Format.NHWC, Format.NLC))
            or rows * columns == 0
        ):
            x = self.proj(x)
            return x if self.output_fmt == Format.NCHW else timm_layers.nchw_to(x, self.output_fmt)
        if projection is None:
            tokens = x.flatten(2).transpose(1, 2)
        else:
            tokens = _project(x[..., : rows * height, : columns * width], projection)
        if not self.flatten and self.output_fmt == Format.NHWC:
            tokens = tokens.unflatten(1, (rows, columns))
        return tokens
