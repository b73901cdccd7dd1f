"""How the layers read a convolution's weights, and apply them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm import layers as timm_layers
from torch import nn

from vitfast.layers import _as_built, _guard
from vitfast.layers._guard import Children
from vitfast.ops import _onednn_conv
from vitfast.ops._onednn_conv import Ready
from vitfast.plans import Conv, Unfit, Unsupported
from vitfast.runtime.library import autocast_dtype

_LOWERED = (torch.float32, torch.bfloat16)
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


class Call(NamedTuple):
    """What a call has in common for all its convolutions."""

    dtype: torch.dtype  # that they compute in
    given: tuple[torch.dtype, ...]  # that weights may have
    records: bool  # whether autograd is on
    pixels: int  # of its map


def direct(x: torch.Tensor) -> Call | None:
    """For maps like x on oneDNN in inference; None where torch's convolutions are to run."""
    records = torch.is_grad_enabled()
    if torch.compiler.is_compiling() or not x.is_cpu or (records and x.requires_grad):
        return None
    lower = autocast_dtype(x.device)
    dtype = lower or x.dtype
    if x.dtype == torch.float64 or not _onednn_conv.available(dtype):
        return None
    pixels = x.numel() // max(x.shape[1], 1)
    return Call(dtype, (x.dtype, *_LOWERED) if lower else (x.dtype,), records, pixels)


def ready(call: Call, conv: Conv, channels: int, adds: bool = False) -> Ready | None:
    """The convolution of so many channels on oneDNN, or None where torch is to run it."""
    if call.records and _guard.records_grad(*conv[:2]):
        return None
    if not _onednn_conv.fits(conv, channels, call.given):
        return None
    return _onednn_conv.prepare(conv, call.dtype, call.pixels, adds)


def covers(x: torch.Tensor, conv: Conv) -> bool:
    """Whether there is anything to convolve."""
    left, right, top, bottom = _onednn_conv.pads(conv, *x.shape[2:])
    reach = [(n - 1) * d for n, d in zip(conv.weight.shape[2:], conv.dilation, strict=True)]
    high, wide = x.shape[2] + top + bottom, x.shape[3] + left + right
    return x.numel() > 0 and high > reach[0] and wide > reach[1]


def apply(x: torch.Tensor, conv: Conv) -> torch.Tensor:
    """The convolution of a map x [B, C, H, W]; the result has x's memory format."""
    last = x.ndim == 4 and channels_last(x)
    call = direct(x) if last and conv.weight.ndim == 4 and covers(x, conv) else None
    if call is not None:
        packed = ready(call, conv, x.shape[1])
        if packed is not None:
            return packed(x.to(call.dtype))
    weight = conv.weight
    if conv.eps is None:
        pass
    elif torch.compiler.is_compiling() or last or _guard.records_grad(x, *conv[:2]):
        weight = _onednn_conv.standardised(weight, conv.eps, last)
    else:
        weight = _onednn_conv.plain_weight(conv)
    padding = conv.padding
    if conv.same:
        left, right, top, bottom = found = _onednn_conv.pads(conv, *x.shape[-2:])
        if left == right and top == bottom:
            padding = (top, left)
        else:
            x, padding = F.pad(x, found), (0, 0)
    return F.conv2d(x, weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)


def channels_last(x: torch.Tensor) -> bool:
    """Whether torch takes this map for a channels-last one."""
    return x.stride(1) == 1 and not x.is_contiguous()
