"""How the layers read a convolution's weights, and apply them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm import layers as timm_layers
from torch import nn

from vitfast.engine.eligibility import records_grad
from vitfast.engine.products import conv as conv_product
from vitfast.layers import _as_built, _guard
from vitfast.layers._guard import Children
from vitfast.plans import Conv, Unfit, Unsupported

KINDS: set[type] = {timm_layers.StdConv2d, timm_layers.StdConv2dSame}
"""The convolutions known by exact class; the drop-ins add themselves."""


def plan(module: Any) -> Conv:
    """What a convolution holds, its own hooks set aside (whoever called it has run them)."""
    if type(module) not in KINDS:
        raise Unsupported(f"convolution {type(module).__name__} is not implemented")
    weight = module.weight
    _as_built.expect(module, out_channels=weight.shape[0], kernel_size=tuple(weight.shape[2:]))
    return _hold(module, module.eps, getattr(module, "same_pad", False))


def plan_plain(module: Any) -> Conv:
    """As `plan`, of a module that must be exactly an nn.Conv2d."""
    if type(module) is not nn.Conv2d:
        raise Unfit(f"a convolution is a {type(module).__name__}, not torch.nn.Conv2d")
    if module.padding_mode != "zeros":
        raise Unsupported(f"padding with {module.padding_mode} is not implemented")
    return _hold(module, None, False)


def _hold(module: Any, eps: float | None, same: bool) -> Conv:
    if isinstance(module.padding, str):
        raise Unsupported(f"padding by name ({module.padding!r}) is not implemented")
    return Conv(
        _guard.tensor(module, "weight"),
        _guard.tensor(module, "bias"),
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        eps,
        same,
    )


def child(children: Children, name: str) -> Conv:
    """What a child holds that must be a weight-standardised convolution."""
    module = children[name]
    _guard.check_bare(module, name)
    return plan(module)


def apply(x: torch.Tensor, conv: Conv) -> torch.Tensor:
    """The convolution of a map x [B, C, H, W]; the result has x's memory format."""
    last = x.ndim == 4 and conv_product.channels_last(x)
    call = (
        conv_product.direct(x)
        if last and conv.weight.ndim == 4 and conv_product.covers(x, conv)
        else None
    )
    if call is not None:
        packed = conv_product.prepare_fitting(call, conv, x.shape[1])
        if packed is not None:
            return packed(x.to(call.dtype))
    weight = conv.weight
    if conv.eps is None:
        pass
    elif torch.compiler.is_compiling() or last or records_grad(x, *conv[:2]):
        weight = conv_product.standardised(weight, conv.eps, last)
    else:
        weight = conv_product.plain_weight(conv)
    padding = conv.padding
    if conv.same:
        left, right, top, bottom = found = conv_product.pads(conv, *x.shape[-2:])
        if left == right and top == bottom:
            padding = (top, left)
        else:
            x, padding = F.pad(x, found), (0, 0)
    return F.conv2d(x, weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)
