"""Norm and residual connection on the kernels of vitfast/ops/common/norm_triton_kernels.py."""

from __future__ import annotations

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common import norm_triton
from vitfast.ops.norm_add.reference import Call
from vitfast.runtime.launches import Arch, Variant


def forward(call: Call) -> tuple[torch.Tensor, ...]:
    _, y, stats = norm_triton.forward(
        norm_op.KINDS[call.norm],
        call.branch,
        weight=call.weight,
        bias=call.bias,
        eps=call.eps,
        out_dtype=call.dtype,
        save_stats=call.save_stats,
        base=call.x,
        normed_scale=call.drop_scale,
    )
    return norm_op.filled(call.x, y, stats)


def backward(grad: torch.Tensor, call: Call, stats: torch.Tensor) -> tuple[torch.Tensor, ...]:
    dbranch, _, _, dweight, dbias = norm_triton.backward(
        norm_op.KINDS[call.norm],
        grad,
        call.branch,
        stats,
        weight=call.weight,
        bias=call.bias,
        eps=call.eps,
        normed_scale=call.drop_scale,
    )
    return dbranch, dweight, dbias


_WIDTHS = (96, 384, 1536)
"""Of Swin V2: its narrowest, its commonest, its widest."""


def variants(arch: Arch) -> list[Variant]:
    """With DropPath: what holds the most registers."""
    present = {
        "forward": {"x", "weight", "bias", "base", "scale", "normed", "stats"},
        "backward": {"grad", "residual", "weight", "scale", "stats", "dx", "dweight", "dbias"},
    }
    return norm_triton.variants(arch, norm_op.LAYER, present, _WIDTHS)
