"""Inference on the CPU of parts of ConvNeXt's block: without the add, or the MLP and add alone.

As `_inference_maps`, some lines or images at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vitfast.layers import _fits, _inference_maps, _memo, _rows
from vitfast.plans import ConvNeXtBlock, MlpResidual
from vitfast.runtime import native
from vitfast.runtime.library import autocast_dtype

if TYPE_CHECKING:
    pass
    from vitfast.layers._rows import Halves

    pass


def convolved(x: torch.Tensor, plan: ConvNeXtBlock) -> torch.Tensor | None:
    """mlp(norm(conv(x))) [B, H, W, C'] of a map x [B, H, W, C]; None where it is for the ops."""
    steps = _memo.recall(_convolved_steps, _rows.count(x), x, plan)
    if steps is None:
        return None
    operand, halves = steps
    x = x.contiguous()
    out = native.empty((*x.shape[:3], len(plan.mlp.fc2.weight)), operand)
    rows_out = out.view(-1, out.shape[3])
    for _, pieces in _inference_maps.convolved(x, plan, operand):
        for rows, normed in pieces:
            rows_out[rows] = halves(halves.hidden(normed))
    return out


def _convolved_steps(
    x: torch.Tensor, plan: ConvNeXtBlock, lower: torch.dtype | None
) -> tuple[torch.dtype, Halves] | None:
    if plan.mlp.grn is not None or not _fits.convolved(x, plan, lower):
        return None
    operand = lower or x.dtype
    return operand, _rows.mlp(plan.mlp, _rows.count(x), operand)


def tail(x: torch.Tensor, y: torch.Tensor, plan: MlpResidual) -> torch.Tensor | None:
    """x + gamma * mlp(y), of maps [B, H, W, C]; None where it is for the public ops."""
    lower = autocast_dtype(x.device)
    if not _fits.tail(x, y, plan, lower):
        return None
    operand, channels = lower or x.dtype, x.shape[3]
    scaled = operand if plan.gamma is None else torch.promote_types(operand, plan.gamma.dtype)
    out = native.empty(x.shape, torch.promote_types(x.dtype, scaled))
    base, inner = (t.contiguous().view(-1, channels) for t in (x, y))
    halves = _rows.mlp(plan.mlp, len(base), operand)
    results = out.view(base.shape)
    for before, rows, after in _rows.in_chunks(base, inner, results):
        hidden = halves.hidden(rows.to(operand))
        halves.add_to(before, plan.gamma, hidden, after)
    return out
