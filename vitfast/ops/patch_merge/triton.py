"""Gathering patches and their norm on the kernels of vitfast/ops/common/norm_triton_kernels.py."""

from __future__ import annotations

from dataclasses import replace

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common import norm_triton
from vitfast.ops.patch_merge.reference import Call
from vitfast.runtime.launches import Arch, Variant


def forward(call: Call) -> tuple[torch.Tensor, ...]:
    gathered, normed, stats = norm_triton.forward(
        norm_op.NONE if call.norm is None else norm_op.KINDS[call.norm],
        call.x,
        weight=call.weight,
        bias=call.bias,
        eps=call.eps,
        out_dtype=call.out_dtype,
        save_stats=call.save_stats and call.norm is not None,
        merge=True,
    )
    return norm_op.filled(call.x, gathered if call.norm is None else normed, stats)


def backward(grad: torch.Tensor, call: Call, stats: torch.Tensor) -> tuple[torch.Tensor, ...]:
    gathered = call.norm is None
    dx, _, _, dweight, dbias = norm_triton.backward(
        norm_op.NONE if call.norm is None else norm_op.KINDS[call.norm],
        None if gathered else grad,
        call.x,
        stats,
        grad_residual=grad if gathered else None,
        weight=call.weight,
        bias=call.bias,
        eps=call.eps,
        merge=True,
    )
    return dx, dweight, dbias


_WIDTHS = (384, 1024, 3072)
"""Four times the width of a stage of Swin: its narrowest, a common one, its widest."""


def variants(arch: Arch) -> list[Variant]:
    normed = {
        "forward": {"x", "weight", "bias", "normed", "stats"},
        "backward": {"grad", "residual", "weight", "stats", "dx", "dweight", "dbias"},
    }
    gathered = {"forward": {"x", "residual"}, "backward": {"grad_residual", "dx"}}
    return [
        *norm_triton.variants(arch, norm_op.LAYER, normed, _WIDTHS, merge=True),
        *(
            replace(v, name=f"gather-{v.name}")
            for v in norm_triton.variants(arch, norm_op.NONE, gathered, _WIDTHS, merge=True)
        ),
    ]
