"""Inference on the CPU of what lies between a map and a residual add that is not the layer's own.

As `_inference_maps`, some lines or images at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vitfast.layers import _fits, _inference_maps, _rows
from vitfast.ops import _gemm
from vitfast.runtime.library import autocast_dtype

if TYPE_CHECKING:
    from vitfast.layers._convnext import ConvNeXt


def convolved(x: torch.Tensor, plan: ConvNeXt) -> torch.Tensor | None:
    """mlp(norm(conv(x))) [B, H, W, C'] of a map x [B, H, W, C]; None where it is for the ops."""
    lower = autocast_dtype(x.device)
    if plan.mlp.grn is not None or not _fits.convolved(x, plan, lower):
        return None
    operand = lower or x.dtype
    x = x.contiguous()
    batch, high, wide, _ = x.shape
    out = _gemm.empty((batch, high, wide, len(plan.mlp.fc2.weight)), operand)
    hidden_of, fc2 = _rows.mlp(plan.mlp, batch * high * wide, operand)
    for images, stripes in _inference_maps._stripes(batch, high, wide):
        part, result = x[images], out[images]
        for lines in stripes:
            found = fc2(hidden_of(_inference_maps._convolved(part, plan, lines, operand)))
            if len(stripes) == 1 and batch == len(part):
                return found.view(out.shape)
            rows = result[:, slice(*lines)]
            rows.copy_(found.view(rows.shape))
    return out
