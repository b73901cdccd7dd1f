"""Plans of whole blocks: transformer blocks, ConvNeXt's block and Swin's downsampling."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from vitfast.engine import originals
from vitfast.layers.reading.attention import read_attention
from vitfast.layers.reading.children import (
    Children,
    check_bare,
    expect_vector,
    read_drop_path,
    read_layer_scale,
    read_linear,
    read_optional_parameter,
    read_parameter,
    read_parts,
)
from vitfast.layers.reading.mlp import read_mlp
from vitfast.layers.reading.norm import read_norm, read_norm_2d
from vitfast.plans import (
    Attention,
    Called,
    ConvNeXtBlock,
    DropRate,
    Linear,
    Mlp,
    Norm,
    PatchMerging,
    TransformerBlock,
    Unfit,
    Unsupported,
)

ConvNeXtHead = tuple[Any, Norm | Callable[[torch.Tensor], torch.Tensor] | None]
"""conv and norm of a block."""


ConvNeXtTail = tuple[Any, torch.Tensor | None, DropRate | None]
"""mlp, gamma and drop of a block."""


def plan_convnext(
    read_head: Callable[[], ConvNeXtHead], read_tail: Callable[[], ConvNeXtTail]
) -> ConvNeXtBlock:
    """A block of what both read; what one cannot read is to be called.

    Raises:
        Unfit: neither can be read; Unsupported if one never can.
    """

    def checked_tail() -> ConvNeXtTail:
        mlp, gamma, drop = read_tail()
        return mlp, expect_vector(gamma, len(mlp.fc2.weight), "layer scale"), drop

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


def read_depthwise(children: Children, name: str) -> Linear:
    """The weights of a child that must be a depthwise convolution to the same size."""
    module = children[name]
    if type(module) is not nn.Conv2d:
        raise Unfit(f"{name} is a {type(module).__name__}, not torch.nn.Conv2d")
    check_bare(module, name)
    kernel = module.kernel_size
    if not (
        module.in_channels == module.out_channels == module.groups
        and module.stride == module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and all(size % 2 == 1 for size in kernel)
        and module.padding in ("same", tuple(size // 2 for size in kernel))
    ):
        raise Unsupported(f"{name} strides, dilates or is not depthwise")
    return Linear(read_parameter(module, "weight"), read_parameter(module, "bias"))


def read_norm_after_conv(children: Children, over_nchw: bool = False) -> Any:
    """What the child "norm" holds, of rows of channels or of NCHW; raises as `read_known`."""
    return read_known(read_norm_2d if over_nchw else read_norm, children, "norm")


def read_known(read: Callable[[Children, str], Any], children: Children, name: str) -> Any:
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


def plan_with_layer_scale(module: nn.Module) -> TransformerBlock:
    """A block whose LayerScale are modules `ls1` and `ls2` (ViT, RelPos)."""
    return _plan_halves(module, lambda i: read_layer_scale(module._modules, f"ls{i}"))


def plan_with_gammas(module: nn.Module) -> TransformerBlock:
    """A block whose LayerScale are parameters `gamma_1` and `gamma_2`, one or both (EVA, BEiT)."""
    return _plan_halves(module, lambda i: read_optional_parameter(module, f"gamma_{i}"))


def plan_without_layer_scale(module: nn.Module) -> TransformerBlock:
    """A block without LayerScale (Swin)."""
    return _plan_halves(module, lambda i: None)


def plan_with_norms_last(module: nn.Module) -> TransformerBlock:
    """A block whose norms come after attention and MLP (Swin V2)."""
    return plan_without_layer_scale(module)._replace(norms_last=True)


def _plan_halves(
    module: nn.Module, gamma: Callable[[int], torch.Tensor | None]
) -> TransformerBlock:
    """Both halves, as far as they can be read.

    Raises:
        Unfit: neither can.
    """
    children = module._modules

    def half(i: int, read: Callable[[Children], tuple[Any, int]]) -> tuple:
        norm, scale = read_norm(children, f"norm{i}"), gamma(i)
        drop = read_drop_path(children, f"drop_path{i}")
        inner, width = read(children)
        norm.check_width(width)
        expect_vector(scale, width, "layer scale")
        return norm, inner, scale, drop

    # Attention last, since it may compute position biases, with a dropout of their own.
    reads = partial(half, 2, _mlp_and_width), partial(half, 1, _attention_and_width)
    second, first = (
        (None, found, None, None) if type(found) is Called else found
        for found in read_parts(*reads)
    )
    return TransformerBlock(*first, *second)


def _attention_and_width(children: Children) -> tuple[Attention, int]:
    found = read_attention(children, "attn")
    return found, found.proj.weight.shape[0]


def _mlp_and_width(children: Children) -> tuple[Mlp, int]:
    found = read_mlp(children, "mlp")
    return found, found.fc2.weight.shape[0]


def plan_patch_merging(module: nn.Module) -> PatchMerging:
    """How timm's `PatchMerging` of Swin computes."""
    children = module._modules
    return PatchMerging(read_linear(children, "reduction"), read_norm(children, "norm"), False)


def plan_patch_merging_norm_last(module: nn.Module) -> PatchMerging:
    """How timm's `PatchMerging` of Swin V2 computes."""
    return plan_patch_merging(module)._replace(norm_last=True)
