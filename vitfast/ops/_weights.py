"""Weights packed for csrc/cpu/gemm.h, kept as long as they are true.

A cached packing is used only while its weight tensor is the same object, with the same storage
address, version counter, dtype, shape and strides, and the same fingerprint: a hash of elements
along a diagonal, which notices what bumps no version counter (edits through `.data`, of inference
tensors, or by other libraries) unless it leaves every one of those elements alone.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vitfast.runtime import native
from vitfast.runtime.native import DTYPE_CODES

CACHE_ROWS = 2048
"""From so many rows on a packing costs little beside its product, and memory counts more."""


@dataclass(frozen=True, slots=True)
class Packed:
    """B of a matrix product: [k, n], or two of them; see csrc/cpu/gemm.h."""

    data: torch.Tensor
    n: int
    k: int
    dtype: torch.dtype
    gated: bool


@dataclass(frozen=True, slots=True)
class _Entry:
    weights: tuple[weakref.ref[torch.Tensor], ...]
    state: tuple[Any, ...]
    packed: Packed


class WeightCache:
    """Packed weights by weight. Entries go when their weight does; the oldest where there are too
    many bytes. Safe to use from several threads: at worst two pack the same weight."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.bytes = 0
        self._entries: dict[tuple[Any, ...], _Entry] = {}
        self._lock = threading.RLock()  # a weakref's callback may run while it is held

    def get(
        self, weights: Sequence[torch.Tensor], dtype: torch.dtype, gate: str
    ) -> Packed:
        """The packing of one weight [N, K] (or two of the same shape), new if need be."""
        module = native.native()
        key = (*map(id, weights), dtype, gate, module.gemm_format())
        state = tuple(_state(module, w) for w in weights)
        entry = self._entries.get(key)
        if (
            entry is not None
            and entry.state == state
            and all(ref() is w for ref, w in zip(entry.weights, weights, strict=True))
        ):
            return entry.packed
        packed = pack(weights, dtype, gate)
        drop = partial(_drop, weakref.ref(self), key)
        entry = _Entry(tuple(weakref.ref(w, drop) for w in weights), state, packed)
        with self._lock:
            self._remove(key)
            self._entries[key] = entry
            self.bytes += packed.data.nbytes
            while self.bytes > self.most_bytes and len(self._entries) > 1:
                self._remove(next(iter(self._entries)))
        return packed

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def _remove(self, key: tuple[Any, ...]) -> None:
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self.bytes -= entry.packed.data.nbytes


def _drop(cache: weakref.ref[WeightCache], key: tuple[Any, ...], _: object) -> None:
    alive = cache()
    if alive is not None:
        alive._remove(key)


def _state(module: Any, w: torch.Tensor) -> tuple[Any, ...]:
    shape, strides, address = w.shape, w.stride(), w.data_ptr()
    columns = w.numel() // shape[0]
    return (
        address,
        0 if w.is_inference() else w._version,
        w.dtype,
        shape,
        strides,
        module.fingerprint(address, w.itemsize, shape[0], columns, strides[0], strides[-1]),
    )


def cacheable(weights: Sequence[torch.Tensor]) -> bool:
    """Plain tensors whose elements the fingerprint can reach: matrices, or contiguous."""
    return all(
        type(w) in (torch.Tensor, torch.nn.Parameter) and (w.ndim == 2 or w.is_contiguous())
        for w in weights
    )


def pack(
    weights: Sequence[torch.Tensor], dtype: torch.dtype, gate: str = "", *, transposed: bool = False
) -> Packed:
    """Pack for y = x W^T (transposed: y = x W), rounded to `dtype`.

    Args:
        weights: [N, K] or with more dimensions after N, float32 or bfloat16; or the gate's weight
            and another one of its shape and dtype.
        gate: "first" or "last" for one weight [2N, K] that holds both, by the half that passes
            through the activation.
    """
    first = weights[0].flatten(1)
    second = weights[1].flatten(1) if len(weights) > 1 else None
    if gate:
        first, second = first.chunk(2) if gate == "first" else reversed(first.chunk(2))
    if second is not None and second.stride() != first.stride():
        first, second = first.contiguous(), second.contiguous()
    b = first if transposed else first.mT
    k, n = b.shape
    module, code = native.native(), DTYPE_CODES[dtype]
    size = module.gemm_packed_bytes(n, k, code, second is not None)
    data = torch.empty(size // 4, dtype=torch.float32)
    module.gemm_pack(
        n,
        k,
        code,
        first.data_ptr(),
        0 if second is None else second.data_ptr(),
        DTYPE_CODES[first.dtype],
        b.stride(1),
        b.stride(0),
        data.data_ptr(),
        native.threads(),
    )
    return Packed(data, n, k, dtype, second is not None)


def _quarter_of_memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (AttributeError, ValueError, OSError):
        return 4 << 30


CACHE = WeightCache(_quarter_of_memory())


def clear_weight_cache() -> None:
    """Forget every packed weight; the next inference call packs anew."""
    CACHE.clear()
