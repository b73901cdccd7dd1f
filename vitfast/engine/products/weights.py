"""Weights as products read them, kept between calls of inference.

To pack a weight takes a tenth of a product of few rows. What is kept is used only while its weight
has the same storage, address, version counter, dtype, shape and strides, and the same content; it
goes with the storage. What bumps no version counter (edits through `.data` or NumPy, by other
processes) is noticed at once where it touches the elements along a diagonal, and within 32 calls
wherever it is: each call hashes another 32nd of every weight. Small tensors, and those of inference
mode, which have no version, are hashed whole every time. `settings.weights` has everything hashed
every time, or nothing ever; under `settings.memory = "low"` nothing is kept.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from vitfast.runtime import memory, native
from vitfast.settings import settings

CACHE_ROWS = 8192
CACHE_ELEMENTS = 1 << 19
"""From so many rows on a packing costs below 3 % of its product, and memory counts more, unless the
weight is small: then nearly all that a packing takes is the 0.17 ms of asking oneDNN for it."""


def worth_keeping(weight: torch.Tensor, rows: int) -> bool:
    """Whether the packing of a weight for so many rows in all should be kept."""
    return rows < CACHE_ROWS or weight.numel() <= CACHE_ELEMENTS


_SMALL = 1 << 16
"""Bytes up to which a tensor is hashed whole every time: 3 us at 20 GB/s."""

_Key = tuple[int, torch.Size, torch.dtype, Hashable]
Packed = TypeVar("Packed")


@dataclass(frozen=True, slots=True)
class _Entry:
    storage: weakref.ref[torch.UntypedStorage]  # torch.utils.swap_tensors refuses one to a tensor
    state: Any
    packed: Any
    nbytes: int


class WeightCache:
    """Packed weights by weight and dtype. An entry goes with its weight's storage, the oldest when
    there are too many bytes. Safe on several threads: at worst two pack the same weight."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.bytes = 0
        self.when_crowded: list[Callable[[], None]] = []  # for those that keep what they got here
        self._thread = threading.local()
        self._entries: dict[_Key, _Entry] = {}
        self._lock = threading.RLock()  # a weakref's callback may run while it is held

    def get(
        self,
        weight: torch.Tensor,
        dtype: torch.dtype,
        form: Hashable,
        pack: Callable[[torch.Tensor, torch.dtype], Packed],
        others: Sequence[torch.Tensor | None] = (),
    ) -> Packed:
        """What `pack` makes of a weight for products of this dtype, new if need be.

        Args:
            weight: [N, ...], contiguous; or [N, K] or [N, C, H, W], channels-last.
            form: what else, besides weight and dtype, the result depends on.
            pack: a function of weight and dtype.
            others: dense tensors that the result depends on, too.
        """
        tensors: tuple[torch.Tensor, ...] = (weight,)
        if others:
            tensors += tuple(t for t in others if t is not None)
            form = (form, *(t is None for t in others))
        self.note(*tensors)
        if settings.memory == "low":
            if self._entries:
                self.clear()
            return pack(weight, dtype)
        storage = weight.untyped_storage()
        key = (weight.data_ptr(), weight.shape, dtype, form)
        entry = self._entries.get(key)
        # What others prepare from this packing they hold against the weight as it is now.
        fully = self._is_noting()
        if (
            entry is not None
            and entry.storage() is storage
            and (settings.weights == "frozen" or same(entry.state, tensors, fully))
        ):
            return entry.packed
        if entry is not None and entry.state.edited >= 0:
            warn_edited(f"a weight of shape {tuple(tensors[entry.state.edited].shape)}")
        found = state(tensors)
        packed = pack(weight, dtype)
        drop = partial(_drop, weakref.ref(self), key)
        nbytes = weight.numel() * dtype.itemsize
        with self._lock:
            self._remove(key)
            self._entries[key] = _Entry(weakref.ref(storage, drop), found, packed, nbytes)
            self.bytes += nbytes
            crowded = self.bytes > self.most_bytes
            while self.bytes > self.most_bytes and len(self._entries) > 1:
                self._remove(list(self._entries)[0])  # a weight that dies meanwhile removes its own
        if crowded:
            self._tell()
        return packed

    @contextlib.contextmanager
    def noting(self) -> Iterator[list[torch.Tensor]]:
        """Collects the tensors of which this thread keeps more than their addresses meanwhile."""
        before, self._thread.noted = getattr(self._thread, "noted", None), []
        try:
            yield self._thread.noted
        finally:
            self._thread.noted = before

    def _is_noting(self) -> bool:
        return getattr(self._thread, "noted", None) is not None

    def note(self, *tensors: torch.Tensor) -> None:
        """Something prepared has these tensors' elements in another form."""
        noted = getattr(self._thread, "noted", None)
        if noted is not None:
            noted.extend(tensors)

    def forget(self, weight: torch.Tensor) -> None:
        """Drop all packings of a weight."""
        with self._lock:
            for key in [key for key in list(self._entries) if key[0] == weight.data_ptr()]:
                self._remove(key)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.bytes = 0
        self._tell()

    def __len__(self) -> int:
        return len(self._entries)

    def _remove(self, key: _Key) -> None:
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self.bytes -= entry.nbytes

    def _tell(self) -> None:
        for tell in self.when_crowded:
            tell()


def _drop(
    cache: weakref.ref[WeightCache], key: _Key, dead: weakref.ref[torch.UntypedStorage]
) -> None:
    alive = cache()
    # The address may be another weight's by now: only the entry of the one that died goes.
    if alive is not None and (entry := alive._entries.get(key)) and entry.storage is dead:
        alive._remove(key)


def is_dense(t: torch.Tensor) -> bool:
    return t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last)


def state(tensors: tuple[torch.Tensor, ...], read: Collection[int] | None = None) -> Any:
    """What tells plain, dense tensors on the CPU of 2 or 4 bytes an item from what they become, see
    above: an object whose `same(tensors)` is true for as long as they are what they were.

    Args:
        read: ids of those whose elements matter; all by default.
    """
    nothing = (0, 0, 0, 0, 0)
    matrices = [
        (t.itemsize, *((*_matrix(t), _is_small(t)) if read is None or id(t) in read else nothing))
        for t in tensors
    ]
    return native.native().TensorState(tensors, matrices, native.threads())


def same(state: Any, tensors: tuple[torch.Tensor, ...], fully: bool = False) -> bool:
    """Whether a `state` still is that of its tensors, as one call after the other can tell.

    Threads are counted now, not when the state was taken: a forked process has others.

    Args:
        fully: whether to look at everything that the tensors hold.
    """
    fully = fully or settings.weights == "verify"
    return state.same(tensors, native.threads(), fully)


def storages(
    state: Any, tensors: tuple[torch.Tensor, ...]
) -> tuple[torch.UntypedStorage, ...] | None:
    """The tensors' storages if the `state` still is theirs; None if not. While these are kept, so
    are the addresses, whatever another thread assigns to a tensor's `data`."""
    fully = settings.weights == "verify"
    return state.storages(tensors, native.threads(), fully)


def warn_edited(what: str) -> None:
    """Tell that an edit was found late, which other answers may have been given without; none was
    where every call looks at all weights."""
    if settings.weights == "verify":
        return
    warnings.warn(
        f"vitfast: {what} was edited in a way that PyTorch does not count (through .data, NumPy "
        "or another process). It is read anew from now on, but up to 31 calls before this one may "
        "have used its old values. Edit parameters themselves, under torch.no_grad()",
        stacklevel=2,
    )


def _is_small(t: torch.Tensor) -> bool:
    """Whether to read all of a tensor takes no longer than to look at its module: vectors, tables,
    the weights of depthwise convolutions."""
    return t.numel() * t.itemsize <= _SMALL or (t.ndim == 4 and t.shape[1] == 1)


def _matrix(w: torch.Tensor) -> tuple[int, ...]:
    """Rows, columns and their strides, of which every output channel has an element on the
    diagonal; nearly square for a convolution's weight, so that it is short."""
    if w.ndim == 2:
        return *w.shape, *w.stride()
    rows = len(w) * w.shape[2] if w.ndim == 4 else w.numel() if w.ndim < 2 else len(w)
    columns = w.numel() // max(rows, 1)
    return rows, columns, w.stride(0) if w.ndim == 1 else columns, 1


CACHE = WeightCache(memory.available() // 4)
if hasattr(os, "register_at_fork"):  # another thread may hold the lock while this one forks
    os.register_at_fork(after_in_child=lambda: setattr(CACHE, "_lock", threading.RLock()))


def clear_weight_cache() -> None:
    """Forget every packed weight; the next inference call packs anew."""
    CACHE.clear()
