"""Convolutions on oneDNN through torch, for inference: channels-last, weights packed once.

A weight is standardised (Qiao et al. 2019) as it is packed. What is kept is used under the rules of
`_onednn`; that one is unpacked costs a convolution of few pixels most of its time. 1x1 convolutions
are linear layers, whose products of many channels are summed in pieces.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from vitfast.ops import _gemm, _onednn, _weight_cache
from vitfast.ops.layer_norm.api import layer_norm
from vitfast.runtime import native
from vitfast.settings import settings

_DTYPES = (torch.float32, torch.bfloat16)


class Conv(NamedTuple):
    """weight [O, C / groups, H, W] and bias [O] of a convolution of maps, and its options.

    eps: of the weight's standardisation; None without one. same: padding as TensorFlow has it, by
    the size of the input, besides `padding`.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    eps: float | None
    same: bool


Pads = tuple[int, int, int, int]
"""Left, right, top, bottom, as `torch.nn.functional.pad` takes them."""


def pads(conv: Conv, height: int, width: int) -> Pads:
    """All that an input of this size is padded with."""
    high, wide = conv.padding
    if not conv.same:
        return wide, wide, high, high
    sizes, kernel = (height, width), conv.weight.shape[2:]
    left, right, top, bottom = same_pads(sizes, kernel, conv.stride, conv.dilation)
    return wide + left, wide + right, high + top, high + bottom


def same_pads(
    sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Pads:
    """What TensorFlow pads a map with, by its sizes; all given as (height, width)."""
    found = []
    for axis in (1, 0):
        size, step, reach = sizes[axis], stride[axis], (kernel[axis] - 1) * dilation[axis]
        total = max((-(-size // step) - 1) * step + reach + 1 - size, 0)
        found += [total // 2, total - total // 2]
    return tuple(found)  # type: ignore[return-value]


def standardised(weight: torch.Tensor, eps: float, channels_last: bool) -> torch.Tensor:
    """(weight - mean) / sqrt(var + eps) over each output channel's, differentiable."""
    out, channels, height, width = weight.shape
    if not channels_last:
        rows = layer_norm(weight.flatten(1), eps=eps, out_dtype=weight.dtype)
        return rows.view(weight.shape)
    rows = layer_norm(weight.permute(0, 2, 3, 1).flatten(1), eps=eps, out_dtype=weight.dtype)
    return rows.view(out, height, width, channels).permute(0, 3, 1, 2)


def available(dtype: torch.dtype) -> bool:
    """Whether convolutions in this dtype are for oneDNN on this machine, as it is set now."""
    if settings.backend != "auto" or native.reasons() or not torch.backends.mkldnn.enabled:
        return False
    return not _missing(dtype)


@functools.cache
def _missing(dtype: torch.dtype) -> bool:
    if _onednn._missing() or not hasattr(torch.ops.mkldnn, "_reorder_convolution_weight"):
        return True
    return dtype not in _DTYPES or (dtype == torch.bfloat16 and not _onednn._bfloat16())


def fits(conv: Conv, channels: int, dtypes: Collection[torch.dtype]) -> bool:
    """Whether this convolution, of plain tensors of these dtypes, can take so many channels."""
    weight, bias = conv[:2]
    return (
        weight.is_cpu
        and weight.ndim == 4
        and weight.shape[1] * conv.groups == channels
        and weight.dtype in dtypes
        and (bias is None or (bias.is_cpu and bias.dtype in dtypes))
        and _dense(weight)
    )


def _dense(weight: torch.Tensor) -> bool:
    last = torch.channels_last
    return weight.is_contiguous() or weight.is_contiguous(memory_format=last)


def _pointwise(conv: Conv) -> bool:
    return conv.weight.shape[2:] == (1, 1) and conv.groups == 1 and conv.padding == (0, 0)


@dataclass(frozen=True, slots=True)
class Ready:
    """A convolution ready to run. Not to be kept between calls: its weight may change."""

    conv: Conv
    pieces: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None
    linear: Callable[[torch.Tensor], torch.Tensor] | None

    def room(self, height: int, width: int) -> Pads | None:
        """What an input of this size has to be padded with before it comes here; None: nothing."""
        left, right, top, bottom = pads(self.conv, height, width)
        return None if left == right and top == bottom else (left, right, top, bottom)

    def __call__(self, x: torch.Tensor, padded: bool = False) -> torch.Tensor:
        """[B, C, H, W] of the dtype it was prepared for to a map with contiguous channels.

        Args:
            padded: x comes with all its padding.
        """
        conv = self.conv
        if self.linear is not None:
            if conv.stride != (1, 1):
                x = x[:, :, :: conv.stride[0], :: conv.stride[1]]
                x = x.contiguous(memory_format=torch.channels_last)
            x = x.permute(0, 2, 3, 1)
            y = self.linear(x.reshape(-1, x.shape[3]))
            return y.view(*x.shape[:3], -1).permute(0, 3, 1, 2)
        padding = [0, 0]
        if not padded:
            left, right, top, bottom = found = pads(conv, *x.shape[2:])
            if left == right and top == bottom:
                padding = [top, left]
            else:
                x = F.pad(x, found)
        return torch.ops.mkldnn._convolution_pointwise.default(
            x, self.pieces[0], self.bias, padding, conv.stride, conv.dilation, conv.groups,
            "none", [], "",
        )  # fmt: skip


def prepare(conv: Conv, dtype: torch.dtype, rows: int) -> Ready:
    """A convolution of inputs of this dtype and about so many pixels, that `available` and `fits`
    allow."""
    _onednn._settle_allocator()
    bias = conv.bias
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    if _pointwise(conv):
        return Ready(conv, (), bias, _linear(conv, bias, dtype, rows))
    form = (conv.eps, conv.stride, conv.dilation, conv.groups)
    pieces = _weight_cache.CACHE.get(conv.weight, dtype, form, partial(_pack, conv))
    return Ready(conv, pieces, bias, None)


def _linear(
    conv: Conv, bias: torch.Tensor | None, dtype: torch.dtype, rows: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    weight = conv.weight
    if _gemm.is_faster(rows, weight, dtype):
        b = _gemm.kept(weight, dtype, form=("standardised", conv.eps), make=partial(_matrix, conv))
        return partial(_gemm.apply, _gemm.Linear(b, weight, bias, "", None, None))
    pack, form = partial(_pack_linear, conv), ("linear", conv.eps)
    pieces = _weight_cache.CACHE.get(weight, dtype, form, pack)
    return _onednn.Linear(pieces, _onednn._step(weight.shape[1], dtype), bias, "none", len(weight))


def plain_weight(conv: Conv) -> torch.Tensor:
    """The weight as a convolution of contiguous maps takes it, kept where nothing forbids it."""
    if conv.eps is None:
        return conv.weight
    weight = conv.weight
    if not weight.is_cpu or weight.itemsize > 4 or native.reasons() or not _dense(weight):
        return standardised(weight, conv.eps, False)

    def pack(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        return (_standard(conv, weight, dtype).contiguous(),)

    return _weight_cache.CACHE.get(weight, weight.dtype, ("contiguous", conv.eps), pack)[0]


def _standard(conv: Conv, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    weight = weight.detach()
    return (weight if conv.eps is None else standardised(weight, conv.eps, True)).to(dtype)


def _matrix(conv: Conv, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return _standard(conv, weight, dtype).reshape(len(weight), -1).contiguous()


def _pack_linear(conv: Conv, weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return _onednn._pack(_matrix(conv, weight, dtype), dtype)


def _pack(conv: Conv, weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    weight = _standard(conv, weight, dtype).contiguous(memory_format=torch.channels_last)
    # Of any size: the blocks that oneDNN chooses are the same.
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        weight, [0, 0], conv.stride, conv.dilation, conv.groups, []
    )
    return (packed,)
