"""LayerNorm on the kernels of vitfast/ops/common/norm_triton_kernels.py."""

from __future__ import annotations

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common import norm_triton
from vitfast.ops.layer_norm.reference import Call
from vitfast.runtime.launches import Arch, Variant


def forward(call: Call) -> tuple[torch.Tensor, ...]:
    _, y, stats = norm_triton.forward(
        norm_op.LAYER,
        call.x,
        weight=call.weight,
        bias=call.bias,
        eps=call.eps,
        out_dtype=call.out_dtype,
        save_stats=call.save_stats,
    )
    return norm_op.filled(call.x, y, stats)


def backward(grad: torch.Tensor, call: Call, stats: torch.Tensor) -> tuple[torch.Tensor, ...]:
    dx, _, _, dweight, dbias = norm_triton.backward(
        norm_op.LAYER, grad, call.x, stats, weight=call.weight, bias=call.bias, eps=call.eps
    )
    return dx, dweight, dbias


def variants(arch: Arch) -> list[Variant]:
    present = {
        "forward": {"x", "weight", "bias", "normed", "stats"},
        "backward": {"grad", "residual", "weight", "stats", "dx", "dweight", "dbias"},
    }
    return norm_triton.variants(arch, norm_op.LAYER, present)
