"""Linear layers on oneDNN through torch, for inference: weights packed once, activation fused.

oneDNN's product is ahead of csrc/cpu/gemm.h on plain layers of many rows (benchmarks/README.md).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from vitfast.engine.products.weights import CACHE, worth_keeping
from vitfast.runtime import native
from vitfast.settings import settings

EXACT_WIDTH = 1024 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 768
"""oneDNN sums all K products of a float32 result in one chain: beyond this K its error passes twice
that of a blocked BLAS, so K is cut into pieces that are added up. MKL's blocks, and with them its
error, are smaller on CPUs without AVX-512: 1024 products in a chain had 2.3 times its error there,
768 have 1.96 times."""

ATTRIBUTES: dict[str, tuple[str, list[float], str]] = {
    "none": ("none", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
}


def columns(weight: torch.Tensor) -> int:
    """K of a weight [N, ...]; 0 of one without rows."""
    return weight.numel() // max(weight.shape[0], 1)


@functools.cache
def _missing() -> list[str]:
    if not torch.backends.mkldnn.is_available():
        return ["this torch was built without oneDNN"]
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ["this torch lacks mkldnn::_linear_pointwise"]
    return []


@functools.cache
def _bfloat16() -> bool:
    probe = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(probe is not None and probe())


def reasons(
    weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, act: str
) -> list[str]:
    """Why oneDNN cannot or should not run this layer; empty when it should."""
    if settings.backend != "auto" or native.reasons():
        return ["another backend was asked for, or there is no fingerprint without the extension"]
    if not torch.backends.mkldnn.enabled:
        return ["torch.backends.mkldnn.enabled is off"]
    why = list(_missing())
    plain = (torch.Tensor, torch.nn.Parameter)
    matrix = weight.ndim == 2 or (weight.ndim > 2 and weight.is_contiguous())
    if not weight.is_cpu or type(weight) not in plain or not matrix or not weight.numel():
        why.append("weight is not a plain matrix on the CPU")
    if weight.dtype not in (torch.float32, torch.bfloat16) or dtype not in (
        torch.float32,
        torch.bfloat16,
    ):
        why.append("dtypes other than float32 and bfloat16 are not implemented")
    elif dtype == torch.bfloat16 and not _missing() and not _bfloat16():
        why.append("oneDNN has no bfloat16 on this CPU")
    if act not in ATTRIBUTES:
        why.append(f"oneDNN has no {act}")
    elif act != "none" and dtype == torch.float32 and columns(weight) > EXACT_WIDTH:
        why.append("so many columns are summed in pieces, before which no activation can go")
    return why


@functools.cache
def _settle_allocator() -> None:
    """Free one block of the largest size that glibc's malloc learns from.

    oneDNN allocates its results. From here on malloc keeps theirs for the next call, instead of
    mapping each anew, page by page: that took an eighth of DINOv2 ViT-S/14 at 518.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


class Linear(NamedTuple):
    """A layer ready to run. Not to be kept between calls: its weight may change."""

    pieces: tuple[torch.Tensor, ...]  # packed, of `step` columns each
    step: int
    bias: torch.Tensor | None
    act: str
    width: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """act(x W^T + bias) for x [M, K] with contiguous rows, in the dtype it was prepared for."""
        if len(self.pieces) == 1:
            return torch.ops.mkldnn._linear_pointwise.default(
                x, self.pieces[0], self.bias, *ATTRIBUTES[self.act]
            )
        return self.of_parts(x.split(self.step, -1))

    def of_parts(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The layer's result for the concatenation of parts [M, step], which is not made."""
        if len(parts) == 1:
            return self(parts[0])
        y = torch.ops.mkldnn._linear_pointwise.default(
            parts[0], self.pieces[0], self.bias, *ATTRIBUTES["none"]
        )
        for part, piece in zip(parts[1:], self.pieces[1:], strict=True):
            y = torch.ops.mkldnn._linear_pointwise.binary(part, y, piece, None, "add")
        return y


def prepare(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    dtype: torch.dtype,
    act: str = "none",
    channels_last: bool = False,
) -> Linear:
    """A layer for products with `rows` rows in all, in this dtype, where no `reasons` are against.

    Args:
        weight: [N, K], float32 or bfloat16, or contiguous with more dimensions; bias: [N].
        channels_last: it is [N, C, H, W], of rows [H, W, C].
    """
    _settle_allocator()
    keep = worth_keeping(weight, rows)
    pack = _pack_channels_last if channels_last else _pack
    pieces = CACHE.get(weight, dtype, pack.__name__, pack) if keep else pack(weight, dtype)
    if bias is not None and bias.dtype != dtype:
        bias = rounded(bias, dtype)
    return Linear(pieces, _step(columns(weight), dtype), bias, act, weight.shape[0])


def rounded(bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    CACHE.note(bias)
    return bias.to(dtype)


class Mlp(NamedTuple):
    """Two layers with a hidden tensor in pieces of columns, each of which is one sum's length."""

    first: tuple[Linear, ...]
    second: Linear

    def hidden(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.first]

    def __call__(self, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        """fc2 of the pieces, which may have been changed in between."""
        return self.second.of_parts(hidden)


def prepare_mlp(
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    rows: int,
    dtype: torch.dtype,
    act: str,
) -> Mlp:
    """Two layers as by `prepare`; their hidden tensor is never cut into pieces by copying."""
    second = prepare(weight2, bias2, rows, dtype)
    step = second.step
    keep = worth_keeping(weight1, rows)
    pack = partial(_pack, rows=step)
    pieces = CACHE.get(weight1, dtype, step, pack) if keep else pack(weight1, dtype)
    biases: Sequence[torch.Tensor | None] = [None] * len(pieces)
    if bias1 is not None:
        bias1 = bias1 if bias1.dtype == dtype else rounded(bias1, dtype)
        biases = bias1.split(step)
    first = (
        Linear((piece,), columns(weight1), bias, act, step)
        for piece, bias in zip(pieces, biases, strict=True)
    )
    return Mlp(tuple(first), second)


def _step(k: int, dtype: torch.dtype) -> int:
    if dtype != torch.float32 or k <= EXACT_WIDTH:
        return k
    count = -(-k // EXACT_WIDTH)
    return -(-k // (16 * count)) * 16


def _pack(weight: torch.Tensor, dtype: torch.dtype, rows: int = 0) -> tuple[torch.Tensor, ...]:
    """Pieces of so many rows, or of all rows and as many columns as are summed in one chain."""
    rounded = weight.detach().flatten(1).to(dtype)
    pieces = rounded.split(rows) if rows else rounded.split(_step(rounded.shape[1], dtype), 1)
    return tuple(
        torch.ops.mkldnn._reorder_linear_weight(piece.contiguous(), 1024) for piece in pieces
    )


def _pack_channels_last(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return _pack(weight.detach().permute(0, 2, 3, 1), dtype)
