"""Residual connection and norm on the kernels of vitfast/ops/common/norm_triton_kernels.py."""

from __future__ import annotations

import torch

from vitfast.ops.add_norm.reference import BackwardCall, Call
from vitfast.ops.common import norm as norm_op
from vitfast.ops.common import norm_triton
from vitfast.runtime.launches import Arch, Variant


def forward(call: Call) -> tuple[torch.Tensor, ...]:
    outputs = norm_triton.forward(
        norm_op.KINDS[call.norm],
        call.x,
        branch=call.branch,
        gamma=call.gamma,
        drop_scale=call.drop_scale,
        weight=call.weight,
        bias=call.bias,
        eps=call.eps,
        out_dtype=call.out_dtype,
        save_stats=call.save_stats,
    )
    return norm_op.filled(call.x, *outputs)


def backward(call: BackwardCall) -> tuple[torch.Tensor, ...]:
    return norm_triton.backward(
        norm_op.KINDS[call.norm],
        call.grad_normed,
        call.residual,
        call.stats,
        grad_residual=call.grad_residual,
        branch=call.branch,
        gamma=call.gamma,
        drop_scale=call.drop_scale,
        weight=call.weight,
        bias=call.bias,
        eps=call.eps,
        x_dtype=call.x_dtype,
        branch_dtype=call.branch_dtype,
    )


def variants(arch: Arch) -> list[Variant]:
    """With LayerScale and DropPath: what holds the most registers."""
    forward = {"x", "branch", "gamma", "drop", "weight", "bias", "residual", "normed", "stats"}
    backward = {
        "grad", "grad_residual", "residual", "branch", "gamma", "drop", "weight", "stats", "dx",
        "dbranch", "dgamma", "dweight", "dbias",
    }  # fmt: skip
    return norm_triton.variants(arch, norm_op.LAYER, {"forward": forward, "backward": backward})
