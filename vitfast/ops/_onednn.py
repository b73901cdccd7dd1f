"""Linear layers on oneDNN through torch, for inference: weights packed once, activation fused.

oneDNN's product is ahead of csrc/cpu/gemm.h on plain layers (benchmarks/README.md), and a packing
saves it a tenth of its time at the few rows of a small image. A cached packing is used only while
its weight is the same object, with the same storage address, version counter, dtype, shape and
strides, and the same fingerprint: a hash of elements along a diagonal, which notices what bumps no
version counter (edits through `.data`, of inference tensors, by other libraries) unless the edit
leaves every one of those elements alone.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vitfast.runtime import native
from vitfast.settings import settings

CACHE_ROWS = 8192
CACHE_ELEMENTS = 1 << 19
"""From so many rows on a packing costs below 3 % of its product, and memory counts more, unless the
weight is small: then nearly all that a packing takes is the 0.17 ms of asking oneDNN for it."""
EXACT_WIDTH = 1024
"""oneDNN sums all K products of a float32 result in one chain: beyond this K its error passes twice
that of a blocked BLAS, so K is cut into pieces that are added up."""

_ATTRIBUTES = {
    "none": ("none", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
}


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
    if act not in _ATTRIBUTES:
        why.append(f"oneDNN has no {act}")
    elif act != "none" and dtype == torch.float32 and weight.numel() > EXACT_WIDTH * len(weight):
        why.append("so many columns are summed in pieces, before which no activation can go")
    return why


@functools.cache
def _settle_allocator() -> None:
    """Free one block of the largest size that glibc's malloc learns from.

    oneDNN allocates its results. From here on malloc keeps theirs for the next call, instead of
    mapping each anew, page by page: that took an eighth of DINOv2 ViT-S/14 at 518.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class Linear:
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
                x, self.pieces[0], self.bias, *_ATTRIBUTES[self.act]
            )
        return self.of_parts(x.split(self.step, -1))

    def of_parts(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """As of the parts' concatenation, each of `step` columns."""
        if len(parts) == 1:
            return self(parts[0])
        y = torch.ops.mkldnn._linear_pointwise.default(
            parts[0], self.pieces[0], self.bias, *_ATTRIBUTES["none"]
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
    keep = rows < CACHE_ROWS or weight.numel() <= CACHE_ELEMENTS
    pack = _pack_channels_last if channels_last else _pack
    pieces = CACHE.get(weight, dtype, pack.__name__, pack) if keep else pack(weight, dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    return Linear(pieces, _step(weight[0].numel(), dtype), bias, act, weight.shape[0])


@dataclass(frozen=True, slots=True)
class Mlp:
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
    keep = rows < CACHE_ROWS or weight1.numel() <= CACHE_ELEMENTS
    pack = partial(_pack, rows=step)
    pieces = CACHE.get(weight1, dtype, step, pack) if keep else pack(weight1, dtype)
    biases: Sequence[torch.Tensor | None] = [None] * len(pieces)
    if bias1 is not None:
        biases = bias1.to(dtype).split(step)
    first = (
        Linear((piece,), weight1[0].numel(), bias, act, step)
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


_Key = tuple[int, torch.dtype, Hashable]


@dataclass(frozen=True, slots=True)
class _Entry:
    weight: weakref.ref[torch.Tensor]
    state: tuple[Any, ...]
    pieces: tuple[torch.Tensor, ...]
    nbytes: int


class WeightCache:
    """Packed weights by weight and dtype. An entry goes with its weight, the oldest when there
    are too many bytes. Safe to use from several threads: at worst two pack the same weight."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.bytes = 0
        self._entries: dict[_Key, _Entry] = {}
        self._lock = threading.RLock()  # a weakref's callback may run while it is held

    def get(
        self,
        weight: torch.Tensor,
        dtype: torch.dtype,
        form: Hashable,
        pack: Callable[[torch.Tensor, torch.dtype], tuple[torch.Tensor, ...]],
    ) -> tuple[torch.Tensor, ...]:
        """What `pack` makes of a weight for products of this dtype, new if need be.

        Args:
            weight: [N, ...], contiguous; or [N, K] or [N, C, H, W], channels-last.
            form: what else, besides weight and dtype, the result depends on.
            pack: a function of weight and dtype.
        """
        key = (id(weight), dtype, form)
        found = state(weight)
        entry = self._entries.get(key)
        if entry is not None and entry.state == found and entry.weight() is weight:
            return entry.pieces
        pieces = pack(weight, dtype)
        drop = partial(_drop, weakref.ref(self), key)
        nbytes = weight.numel() * dtype.itemsize
        with self._lock:
            self._remove(key)
            self._entries[key] = _Entry(weakref.ref(weight, drop), found, pieces, nbytes)
            self.bytes += nbytes
            while self.bytes > self.most_bytes and len(self._entries) > 1:
                self._remove(list(self._entries)[0])  # a weight that dies meanwhile removes its own
        return pieces

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def _remove(self, key: _Key) -> None:
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self.bytes -= entry.nbytes


def _drop(cache: weakref.ref[WeightCache], key: _Key, dead: weakref.ref[torch.Tensor]) -> None:
    alive = cache()
    # The id may belong to another weight by now: only the entry of the one that died goes.
    if alive is not None and (entry := alive._entries.get(key)) and entry.weight is dead:
        alive._remove(key)


def state(w: torch.Tensor) -> tuple[Any, ...]:
    """What tells a weight from what it was, see above; equal as long as it is the same."""
    version = 0 if w.is_inference() else w._version
    address = w.data_ptr()
    fingerprint = native.native().fingerprint(address, w.itemsize, *_matrix(w), native.threads())
    return address, version, w.dtype, w.shape, w.stride(), fingerprint


def _matrix(w: torch.Tensor) -> tuple[int, int, int, int]:
    """Rows, columns and their strides, of which every output channel has an element on the
    diagonal; nearly square for a convolution's weight, so that it is short."""
    if w.ndim == 2:
        return *w.shape, *w.stride()  # type: ignore[return-value]
    rows = len(w) * w.shape[2] if w.ndim == 4 else len(w)
    columns = w.numel() // max(rows, 1)
    return rows, columns, columns, 1


CACHE = WeightCache(native.memory() // 4)


def clear_weight_cache() -> None:
    """Forget every packed weight; the next inference call packs anew."""
    CACHE.clear()
