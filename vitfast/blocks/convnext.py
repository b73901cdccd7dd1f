"""The block of ConvNeXt: a depthwise convolution, a norm over channels and an MLP, channels last.

x + drop_path(gamma * fc2(grn(act(fc1(norm(conv(x)))))))
"""

from __future__ import annotations

from typing import Any

import torch

from vitfast import ops
from vitfast.blocks.launched import through_list
from vitfast.blocks.parts import add_residual, apply_mlp
from vitfast.engine import convnext as engine
from vitfast.engine import donation, memo
from vitfast.engine.eligibility import takes_engine
from vitfast.plans import Called, ConvNeXtBlock, Norm
from vitfast.runtime.library import autocast_dtype


def run_convnext_block(
    x: torch.Tensor, block: ConvNeXtBlock, module: Any, over_nchw: bool = False
) -> torch.Tensor:
    """The block on x [B, C, H, W] of any strides; the result is channels-last.

    Args:
        module, over_nchw: whose children are called where they are not read; as what they take it.
    """
    rows = x.permute(0, 2, 3, 1)
    if type(block.mlp) is Called or type(block.conv) is Called:
        donation.withdraw()
    if type(block.mlp) is Called:
        return _call_tail(x, _normed(rows, block), module, over_nchw)
    if type(block.conv) is Called:
        y = _call_head(x, module, over_nchw)
        # A hook there may have changed what is still to come, and given any tensor.
        fresh = memo.recall_plan(type(module).plan, module, x, y)
        if fresh is None or type(fresh.mlp) is Called or y.shape != rows.shape:
            return _call_tail(x, y, module, over_nchw)
        branch = apply_mlp(y, fresh.mlp)
        return add_residual(rows, branch, fresh.gamma, fresh.drop).permute(0, 3, 1, 2)
    out = None
    if isinstance(block.norm, Norm) and takes_engine(rows, block):
        out = engine.block(rows, block)
    if out is None:
        out = through_list(_differentiable, rows, block)
    return out.permute(0, 3, 1, 2)


def run_convnext_branch(x: torch.Tensor, block: ConvNeXtBlock) -> torch.Tensor:
    """fc2(act(fc1(norm(conv(x))))) alone, of x [B, C, H, W]; it may have another width than x."""
    rows = x.permute(0, 2, 3, 1)
    out = None
    if takes_engine(rows, block):
        out = engine.branch(rows, block)
    if out is None:
        out = through_list(_branch, rows, block)
    return out.permute(0, 3, 1, 2)


def _differentiable(x: torch.Tensor, block: ConvNeXtBlock) -> torch.Tensor:
    """Through the public ops: autograd, torch.compile and any backend."""
    return add_residual(x, _branch(x, block), block.gamma, block.drop)


def _call_head(x: torch.Tensor, module: Any, over_nchw: bool) -> torch.Tensor:
    """What timm's forward makes of x [B, C, H, W] before the MLP: norm(conv(x)), [B, H, W, C]."""
    children = module._modules
    y = children["conv_dw"](x)
    if over_nchw:
        return children["norm"](y).permute(0, 2, 3, 1)
    return children["norm"](y.permute(0, 2, 3, 1))


def _call_tail(x: torch.Tensor, y: torch.Tensor, module: Any, over_nchw: bool) -> torch.Tensor:
    """What timm's forward makes of x [B, C, H, W] and norm(conv(x)) [B, H, W, C]."""
    children = module._modules
    y = children["mlp"](y.permute(0, 3, 1, 2) if over_nchw else y)
    if "ls" in children:
        y = children["ls"](y)
    y = y if over_nchw else y.permute(0, 3, 1, 2)
    gamma = getattr(module, "gamma", None)
    if gamma is not None:
        y = y.mul(gamma.reshape(1, -1, 1, 1))
    return children["drop_path"](y) + x


def _branch(x: torch.Tensor, block: ConvNeXtBlock) -> torch.Tensor:
    return apply_mlp(_normed(x, block), block.mlp)


def _normed(x: torch.Tensor, block: ConvNeXtBlock) -> torch.Tensor:
    """norm(conv(x)), by the differentiable ops."""
    norm, conv = block.norm, block.conv
    if isinstance(norm, Norm):
        double = torch.float64 in (x.dtype, conv.weight.dtype)
        return ops.dwconv_norm(
            x,
            conv.weight,
            conv.bias,
            norm.weight,
            norm.bias,
            norm.eps,
            norm=norm.kind,
            out_dtype=None if double else autocast_dtype(x.device),
        )
    assert norm is not None  # only where the convolution is called, too
    return norm(ops.dwconv_norm(x, conv.weight, conv.bias, norm=None))
