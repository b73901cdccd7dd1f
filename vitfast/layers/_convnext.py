"""The block of ConvNeXt: a depthwise convolution, a norm over channels and an MLP, channels last.

x + drop_path(gamma * fc2(grn(act(fc1(norm(conv(x)))))))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from vitfast import ops
from vitfast.layers import _block, _guard, _inference_branch, _inference_maps, _mlp
from vitfast.layers._guard import Children, DropRate, Linear, Unsupported
from vitfast.layers._mlp import Mlp
from vitfast.layers._norm import Norm
from vitfast.runtime.library import autocast_dtype


class ConvNeXt(NamedTuple):
    """What a block holds. conv: weight [C, 1, k, k'] and bias [C]; gamma [C] or None.

    norm: a function of [B, H, W, C] where vitfast has no such norm.
    """

    conv: Linear
    norm: Norm | Callable[[torch.Tensor], torch.Tensor]
    mlp: Mlp
    gamma: torch.Tensor | None
    drop: DropRate | None


def depthwise(children: Children, name: str) -> Linear:
    """The weights of a child that must be a depthwise convolution to the same size."""
    module = children[name]
    if type(module) is not nn.Conv2d:
        raise _guard.Unfit(f"{name} is a {type(module).__name__}, not torch.nn.Conv2d")
    _guard.check_bare(module, name)
    kernel = module.kernel_size
    if not (
        module.in_channels == module.out_channels == module.groups
        and module.stride == module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and all(size % 2 == 1 for size in kernel)
        and module.padding in ("same", tuple(size // 2 for size in kernel))
    ):
        raise Unsupported(f"{name} strides, dilates or is not depthwise")
    return Linear(_guard.tensor(module, "weight"), _guard.tensor(module, "bias"))


def run(x: torch.Tensor, block: ConvNeXt) -> torch.Tensor:
    """The block on x [B, C, H, W] of any strides; the result is channels-last."""
    rows = x.permute(0, 2, 3, 1)
    out = None
    fits = isinstance(block.norm, Norm) and not torch.compiler.is_compiling()
    if fits and not _block.records(rows, block):
        out = _inference_maps.convnext(rows, block)
    if out is None:
        out = _differentiable(rows, block)
    return out.permute(0, 3, 1, 2)


def run_branch(x: torch.Tensor, block: ConvNeXt) -> torch.Tensor:
    """fc2(act(fc1(norm(conv(x))))) alone, as `run`; it may have another width than x."""
    rows = x.permute(0, 2, 3, 1)
    out = None
    if not (torch.compiler.is_compiling() or _block.records(rows, block)):
        out = _inference_branch.convolved(rows, block)
    if out is None:
        out = _branch(rows, block)
    return out.permute(0, 3, 1, 2)


def _differentiable(x: torch.Tensor, block: ConvNeXt) -> torch.Tensor:
    """Through the public ops: autograd, torch.compile and any backend."""
    return _block.add(x, _branch(x, block), block.gamma, block.drop)


def _branch(x: torch.Tensor, block: ConvNeXt) -> torch.Tensor:
    norm = block.norm
    if isinstance(norm, Norm):
        double = torch.float64 in (x.dtype, block.conv.weight.dtype)
        normed = ops.dwconv_norm(
            x,
            *block.conv,
            norm.weight,
            norm.bias,
            norm.eps,
            norm=norm.kind,
            out_dtype=None if double else autocast_dtype(x.device),
        )
    else:
        normed = norm(ops.dwconv_norm(x, *block.conv, norm=None))
    return _mlp.apply(normed, block.mlp)
