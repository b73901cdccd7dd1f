"""The block of ConvNeXt: a depthwise convolution, a norm over channels and an MLP, channels last.

x + drop_path(gamma * fc2(grn(act(fc1(norm(conv(x)))))))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vitfast import ops
from vitfast.engine import convnext as engine
from vitfast.engine import memo, originals
from vitfast.engine.eligibility import records
from vitfast.layers import _block, _guard, _mlp, _norm
from vitfast.layers._guard import Children
from vitfast.plans import Called, ConvNeXtBlock, DropRate, Linear, Norm, Unfit, Unsupported
from vitfast.runtime.library import autocast_dtype

Head = tuple[Any, Norm | Callable[[torch.Tensor], torch.Tensor] | None]
"""conv and norm of a block."""
Tail = tuple[Any, torch.Tensor | None, DropRate | None]
"""mlp, gamma and drop of a block."""


def plan(read_head: Callable[[], Head], read_tail: Callable[[], Tail]) -> ConvNeXtBlock:
    """A block of what both read; what one cannot read is to be called.

    Raises:
        Unfit: neither can be read; Unsupported if one never can.
    """

    def checked_tail() -> Tail:
        mlp, gamma, drop = read_tail()
        return mlp, _guard.vector(gamma, len(mlp.fc2.weight), "layer scale"), drop

    head, why_head = _attempt(read_head)
    tail, why_tail = _attempt(checked_tail)
    if head is None and tail is None:
        raise Unfit(why_head)
    return ConvNeXtBlock(
        *(head or (Called(why_head), None)),
        *(tail or (Called(why_tail), None, None)),
    )


def _attempt(read: Callable[[], Any]) -> tuple[Any, str]:
    """What `read` gives, or None and why not."""
    try:
        return read(), ""
    except Unsupported:
        raise
    except Unfit as reason:
        return None, str(reason)


def depthwise(children: Children, name: str) -> Linear:
    """The weights of a child that must be a depthwise convolution to the same size."""
    module = children[name]
    if type(module) is not nn.Conv2d:
        raise Unfit(f"{name} is a {type(module).__name__}, not torch.nn.Conv2d")
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


def norm(children: Children, over_nchw: bool = False) -> Any:
    """What the child "norm" holds, of rows of channels or of NCHW; raises as `child`."""
    return child(_norm.child_2d if over_nchw else _norm.child, children, "norm")


def child(read: Callable[[Children, str], Any], children: Children, name: str) -> Any:
    """What `read` reads of a child.

    Raises:
        Unfit: it cannot be read; Unsupported if it is torch's or timm's and never can.
    """
    try:
        return read(children, name)
    except Unsupported as reason:
        if originals.is_known(type(children[name])):
            raise
        raise Unfit(str(reason)) from None


def run(
    x: torch.Tensor, block: ConvNeXtBlock, module: Any, over_nchw: bool = False
) -> torch.Tensor:
    """The block on x [B, C, H, W] of any strides; the result is channels-last.

    Args:
        module, over_nchw: whose children are called where they are not read; as what they take it.
    """
    rows = x.permute(0, 2, 3, 1)
    if type(block.mlp) is Called:
        return _call_tail(x, _normed(rows, block), module, over_nchw)
    if type(block.conv) is Called:
        y = _call_head(x, module, over_nchw)
        # A hook there may have changed what is still to come, and given any tensor.
        fresh = memo.recall_plan(type(module).plan, module, x, y)
        if fresh is None or type(fresh.mlp) is Called or y.shape != rows.shape:
            return _call_tail(x, y, module, over_nchw)
        branch = _mlp.apply(y, fresh.mlp)
        return _block.add(rows, branch, fresh.gamma, fresh.drop).permute(0, 3, 1, 2)
    out = None
    fits = isinstance(block.norm, Norm) and not torch.compiler.is_compiling()
    if fits and not records(rows, block):
        out = engine.block(rows, block)
    if out is None:
        out = _differentiable(rows, block)
    return out.permute(0, 3, 1, 2)


def run_branch(x: torch.Tensor, block: ConvNeXtBlock) -> torch.Tensor:
    """fc2(act(fc1(norm(conv(x))))) alone, as `run`; it may have another width than x."""
    rows = x.permute(0, 2, 3, 1)
    out = None
    if not (torch.compiler.is_compiling() or records(rows, block)):
        out = engine.branch(rows, block)
    if out is None:
        out = _branch(rows, block)
    return out.permute(0, 3, 1, 2)


def _differentiable(x: torch.Tensor, block: ConvNeXtBlock) -> torch.Tensor:
    """Through the public ops: autograd, torch.compile and any backend."""
    return _block.add(x, _branch(x, block), block.gamma, block.drop)


def _call_head(x: torch.Tensor, module: Any, over_nchw: bool) -> torch.Tensor:
    """What timm's forward makes of x [B, C, H, W] before the MLP: norm(conv(x)), [B, H, W, C]."""
    children = module._modules
    y = children["conv_dw"](x)
    if over_nchw:
        return children["norm"](y).permute(0, 2, 3, 1)  # type: ignore[no-any-return]
    return children["norm"](y.permute(0, 2, 3, 1))  # type: ignore[no-any-return]


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
    return children["drop_path"](y) + x  # type: ignore[no-any-return]


def _branch(x: torch.Tensor, block: ConvNeXtBlock) -> torch.Tensor:
    return _mlp.apply(_normed(x, block), block.mlp)


def _normed(x: torch.Tensor, block: ConvNeXtBlock) -> torch.Tensor:
    """norm(conv(x)), by the differentiable ops."""
    norm = block.norm
    if isinstance(norm, Norm):
        double = torch.float64 in (x.dtype, block.conv.weight.dtype)
        return ops.dwconv_norm(
            x,
            *block.conv,
            norm.weight,
            norm.bias,
            norm.eps,
            norm=norm.kind,
            out_dtype=None if double else autocast_dtype(x.device),
        )
    return norm(ops.dwconv_norm(x, *block.conv, norm=None))
