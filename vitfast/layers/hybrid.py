"""Drop-in for timm's HybridEmbed: a convolutional stem, and its projection to tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm import layers as timm_layers
from timm.layers import Format
from torch import nn

from vitfast import ops, plans
from vitfast.engine.eligibility import may_fuse, planned
from vitfast.engine.products import conv as conv_product
from vitfast.layers import stem
from vitfast.layers.base import Layer
from vitfast.layers.reading.children import check_bare
from vitfast.layers.reading.conv import plan_projection
from vitfast.plans import Unfit


def plan_stem(module: Any) -> plans.Projection | None:
    """The projection of what the backbone gives; None for none."""
    children = module._modules
    if type(children["proj"]) is nn.Identity:
        check_bare(children["proj"], "proj")
        return None
    return plan_projection(module)


def _project(x: torch.Tensor, plan: plans.Projection) -> torch.Tensor:
    """A map [B, C, H, W], a multiple of the patch, to tokens [B, N, C']."""
    weight, bias = plan
    size = weight.shape[2], weight.shape[3]
    if conv_product.channels_last(x) and x.numel() > 0:
        conv = plans.Conv(weight, bias, size, (0, 0), (1, 1), 1, None, False)
        call = conv_product.direct(x)
        packed = conv_product.prepare_fitting(call, conv, x.shape[1]) if call is not None else None
        if call is not None and packed is not None:
            return packed(x.to(call.dtype)).permute(0, 2, 3, 1).flatten(1, 2)
    if size == (1, 1):
        return ops.linear_act(x.flatten(2).transpose(1, 2), weight.flatten(1), bias)
    return ops.patch_embed(x, weight, bias)


class HybridEmbed(Layer, timm_layers.HybridEmbed):
    """`timm.layers.HybridEmbed`, whose backbone gets its images channels-last.

    The backbone is called as it is, its parts swapped one by one; but for the beginning of a
    ResNetV2 in inference on the CPU. Tokens come out contiguous.
    """

    plan = staticmethod(plan_stem)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not may_fuse(x) or x.ndim != 4:
            return super().forward(x)
        try:
            plan = planned(plan_stem, self)
        except Unfit:
            return super().forward(x)
        x = stem.features(self.backbone, x)
        if isinstance(x, (list, tuple)):
            x = x[-1]
        height, width = (1, 1) if plan is None else plan.weight.shape[-2:]
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
        if plan is None:
            tokens = x.flatten(2).transpose(1, 2)
        else:
            tokens = _project(x[..., : rows * height, : columns * width], plan)
        if not self.flatten and self.output_fmt == Format.NHWC:
            tokens = tokens.unflatten(1, (rows, columns))
        return tokens
