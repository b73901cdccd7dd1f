"""Convolutions on oneDNN through torch, for inference: channels-last, weights packed once.

A weight is standardised (Qiao et al. 2019) as it is packed, or takes the BatchNorm after it along.
What is kept is used under the rules of `weights`. Without a packed weight, packing dominates a
small convolution. Convolutions of disjoint patches, 1x1 ones among them, are linear layers: oneDNN
takes up to 30 times as long for some of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from vitfast.engine.eligibility import records_grad, takes_engine
from vitfast.engine.products import onednn
from vitfast.engine.products import weights as weights_cache
from vitfast.engine.products.linear import GemmLinear, apply_gemm, is_gemm_faster, matrix_of_packed
from vitfast.ops.common import gemm
from vitfast.ops.layer_norm.api import layer_norm
from vitfast.plans import BatchNorm, Conv, Pads
from vitfast.runtime import native
from vitfast.runtime.library import autocast_dtype
from vitfast.settings import settings

_DTYPES = (torch.float32, torch.bfloat16)


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
    if onednn._missing() or not hasattr(torch.ops.mkldnn, "_reorder_convolution_weight"):
        return True
    return dtype not in _DTYPES or (dtype == torch.bfloat16 and not onednn._bfloat16())


def fits(conv: Conv, channels: int, dtypes: Collection[torch.dtype]) -> bool:
    """Whether this convolution, of plain tensors of these dtypes, can take so many channels."""
    weight, bias, norm = conv.weight, conv.bias, conv.norm
    return (
        (norm is None or all(_channels(t, len(weight)) for t in norm[:4]))
        and weight.is_cpu
        and weight.ndim == 4
        and weight.shape[1] * conv.groups == channels
        and weight.dtype in dtypes
        and (bias is None or (bias.is_cpu and bias.dtype in dtypes))
        and weights_cache.is_dense(weight)
    )


def _channels(t: torch.Tensor | None, size: int) -> bool:
    return t is None or (t.is_cpu and t.shape == (size,) and t.is_contiguous())


def _of_patches(conv: Conv) -> bool:
    """Whether it sees every element at most once."""
    kernel = tuple(conv.weight.shape[2:])
    if conv.groups != 1 or conv.padding != (0, 0):
        return False
    return kernel == (1, 1) or (kernel == conv.stride and conv.dilation == (1, 1) and not conv.same)


class Ready(NamedTuple):
    """A convolution ready to run. Not to be kept between calls: its weight may change."""

    conv: Conv
    pieces: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None
    linear: onednn.Linear | Callable[[torch.Tensor], torch.Tensor] | None
    own: GemmLinear | None = None  # the same on our own kernel

    def padding(self, height: int, width: int) -> Pads | None:
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
            x = self._patches(x)
            return self.linear(x.flatten(0, 2)).view(*x.shape[:3], -1).permute(0, 3, 1, 2)
        padding = [0, 0]
        if not padded:
            left, right, top, bottom = found = pads(conv, *x.shape[2:])
            if left == right and top == bottom:
                padding = [top, left]
            else:
                x = F.pad(x, found)
        act, after = _fused(conv.act)
        y = torch.ops.mkldnn._convolution_pointwise.default(
            x, self.pieces[0], self.bias, padding, conv.stride, conv.dilation, conv.groups,
            *onednn.ATTRIBUTES[act],
        )  # fmt: skip
        return y.relu_() if after else y

    def _patches(self, x: torch.Tensor) -> torch.Tensor:
        """What the linear layer takes, contiguous [B, H', W', h * w * C]."""
        (high, wide), (down, across) = self.conv.weight.shape[2:], self.conv.stride
        x = x.permute(0, 2, 3, 1)
        if high == wide == 1:
            return x[:, ::down, ::across].contiguous()
        x = x.unfold(1, high, down).unfold(2, wide, across)  # [B, H', W', C, h, w]
        return x.permute(0, 1, 2, 4, 5, 3).flatten(3).contiguous()

    def add_relu(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """relu(residual + self(x)), in the dtype of both."""
        if self.own is None or not residual.is_contiguous(memory_format=torch.channels_last):
            return self(x).add_(residual).relu_()
        rows, others = (t.permute(0, 2, 3, 1) for t in (x, residual))
        out = apply_gemm(self.own, rows, residual=others)
        return out.relu_().permute(0, 3, 1, 2)


def _fused(act: str) -> tuple[str, bool]:
    """What oneDNN applies, and whether ReLU is left: its own makes zeros of NaN."""
    return ("none", True) if act == "relu" else (act, False)


def prepare(conv: Conv, dtype: torch.dtype, rows: int, adds: bool = False) -> Ready:
    """A convolution of inputs of this dtype and about so many pixels, that `available` and `fits`
    allow. adds: for `Ready.add_relu`."""
    onednn._settle_allocator()
    if _of_patches(conv):
        return _prepare_linear(conv, dtype, rows, adds)
    form = (conv.eps, conv.stride, conv.dilation, conv.groups)
    pieces, bias = _kept(conv, dtype, form, partial(_pack, conv))
    return Ready(conv, pieces, bias, None)


def _prepare_linear(conv: Conv, dtype: torch.dtype, rows: int, adds: bool) -> Ready:
    weight = conv.weight
    adds = adds and conv.stride == (1, 1)
    if is_gemm_faster(1 if adds else rows, weight, dtype):
        form = ("in order", native.isa(), conv.eps)
        (b,), bias = _kept(conv, dtype, form, partial(_pack_in_order, conv))
        own = GemmLinear(b, weight, bias, "", None, None)
        run = partial(apply_gemm, own, act=conv.act)
        return Ready(conv, (), bias, run, own if adds else None)
    pieces, bias = _kept(conv, dtype, ("linear", conv.eps), partial(_pack_linear, conv))
    step = onednn._step(onednn.columns(weight), dtype)
    act, after = _fused(conv.act)
    linear = onednn.Linear(pieces, step, bias, act, weight.shape[0])
    return Ready(conv, (), bias, (lambda x: linear(x).relu_()) if after else linear)


Pack = Callable[[torch.Tensor, torch.dtype], tuple[Any, ...]]


def _kept(
    conv: Conv, dtype: torch.dtype, form: tuple[Hashable, ...], pack: Pack
) -> tuple[tuple[Any, ...], torch.Tensor | None]:
    """The packed weight and the bias, which a norm changes, too."""
    bias, norm = conv.bias, conv.norm
    if norm is None:
        if bias is not None and bias.dtype != dtype:
            bias = onednn.rounded(bias, dtype)
        return weights_cache.CACHE.get(conv.weight, dtype, form, pack), bias

    def both(weight: torch.Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
        return *pack(weight, dtype), _folded_bias(conv, norm).to(dtype)

    form, others = (*form, norm.eps), (bias, *norm[:4])
    *pieces, bias = weights_cache.CACHE.get(conv.weight, dtype, form, both, others)
    return tuple(pieces), bias


def _scale(norm: BatchNorm) -> torch.Tensor:
    scale = (norm.var.double() + norm.eps).rsqrt()
    return scale if norm.weight is None else scale * norm.weight.detach()


def _folded_bias(conv: Conv, norm: BatchNorm) -> torch.Tensor:
    centre = -norm.mean.double() if conv.bias is None else conv.bias.detach() - norm.mean.double()
    bias = centre * _scale(norm)
    return bias if norm.bias is None else bias + norm.bias.detach()


def plain_weight(conv: Conv) -> torch.Tensor:
    """The weight as a convolution of contiguous maps takes it, kept where nothing forbids it."""
    if conv.eps is None:
        return conv.weight
    weight = conv.weight
    if (
        not weight.is_cpu
        or weight.itemsize > 4
        or native.reasons()
        or not weights_cache.is_dense(weight)
    ):
        return standardised(weight, conv.eps, False)

    def pack(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        return (_standard(conv, weight, dtype).contiguous(),)

    return weights_cache.CACHE.get(weight, weight.dtype, ("contiguous", conv.eps), pack)[0]


def _standard(conv: Conv, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    weight = weight.detach()
    if conv.eps is not None:
        weight = standardised(weight, conv.eps, True)
    if conv.norm is not None:
        weight = weight * _scale(conv.norm)[:, None, None, None]
    return weight.to(dtype)


def _matrix(conv: Conv, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rows = _standard(conv, weight, dtype).permute(0, 2, 3, 1)
    return rows.reshape(len(weight), -1).contiguous()


def _pack_in_order(conv: Conv, weight: torch.Tensor, dtype: torch.dtype) -> tuple[gemm.Matrix]:
    packed = gemm.in_order(gemm.matrix((_matrix(conv, weight, dtype),), dtype, 0))
    return (matrix_of_packed(weight, dtype, packed),)


def _pack_linear(conv: Conv, weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return onednn._pack(_matrix(conv, weight, dtype), dtype)


def _pack(conv: Conv, weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    weight = _standard(conv, weight, dtype).contiguous(memory_format=torch.channels_last)
    # Of any size: the blocks that oneDNN chooses are the same.
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        weight, [0, 0], conv.stride, conv.dilation, conv.groups, []
    )
    return (packed,)


_LOWERED = (torch.float32, torch.bfloat16)


class MapKind(NamedTuple):
    """What all convolutions of a map have in common."""

    dtype: torch.dtype  # that they compute in
    given: tuple[torch.dtype, ...]  # that weights may have
    pixels: int  # of its map


def direct(x: torch.Tensor) -> MapKind | None:
    """For maps like x on oneDNN in inference; None where torch's convolutions are to run."""
    if not takes_engine(x):
        return None
    autocast = autocast_dtype(x.device)
    dtype = autocast or x.dtype
    if x.dtype == torch.float64 or not available(dtype):
        return None
    pixels = x.numel() // max(x.shape[1], 1)
    return MapKind(dtype, (x.dtype, *_LOWERED) if autocast else (x.dtype,), pixels)


def prepare_fitting(kind: MapKind, conv: Conv, channels: int, adds: bool = False) -> Ready | None:
    """The convolution of so many channels on oneDNN, or None where torch is to run it."""
    if records_grad(conv) or not fits(conv, channels, kind.given):
        return None
    return prepare(conv, kind.dtype, kind.pixels, adds)


def covers(x: torch.Tensor, conv: Conv) -> bool:
    """Whether there is anything to convolve."""
    left, right, top, bottom = pads(conv, *x.shape[2:])
    reach = [(n - 1) * d for n, d in zip(conv.weight.shape[2:], conv.dilation, strict=True)]
    high, wide = x.shape[2] + top + bottom, x.shape[3] + left + right
    return x.numel() > 0 and high > reach[0] and wide > reach[1]


def channels_last(x: torch.Tensor) -> bool:
    """Whether torch takes this map for a channels-last one."""
    return x.stride(1) == 1 and not x.is_contiguous()
