"""Storages of large results, used again when nobody else has them any more.

The C library gives blocks above 32 MiB back to the system, and smaller ones too once enough of them
are free: each result would be mapped anew, which takes longer than many a kernel does.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from typing import NamedTuple

import torch


class _Kept(NamedTuple):
    storage: torch.UntypedStorage
    nbytes: int
    address: int

    def references(self) -> tuple[int, int]:
        """Of tensors to the storage, and of Python to the object that it is there."""
        return torch._C._storage_Use_Count(self.storage._cdata), sys.getrefcount(self.storage)

    def is_whole(self) -> bool:
        """Whether the memory is still that which was kept: not resized, not shared."""
        return self.storage.nbytes() == self.nbytes and self.storage.data_ptr() == self.address


class Storages:
    """Ordinary storages of the CPU, of at most so many bytes together."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._kept: list[_Kept] = []  # used longest ago first
        self._lock = threading.Lock()
        self._unused: tuple[int, int] | None = None  # what an unused storage's references are
        if not getattr(sys, "_is_gil_enabled", lambda: True)():
            self.most_bytes = 0  # without the interpreter's lock, counts of references may lag
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    def take(self, nbytes: int) -> torch.UntypedStorage | None:
        """One of exactly so many bytes that nobody uses, of unknown content; None if none is."""
        with self._lock:
            for i, kept in enumerate(self._kept):
                if kept.nbytes == nbytes and self._is_unused(kept):
                    del self._kept[i]
                    if not kept.is_whole():
                        return None
                    self._kept.append(kept)
                    return kept.storage
        return None

    def keep(self, storage: torch.UntypedStorage) -> None:
        """Have a storage used again, once nobody else does."""
        nbytes = storage.nbytes()
        if nbytes > self.most_bytes:
            return
        with self._lock:
            self._kept.append(_Kept(storage, nbytes, storage.data_ptr()))
            while self.nbytes() > self.most_bytes:
                del self._kept[0]

    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in self._kept)

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()

    def _is_unused(self, kept: _Kept) -> bool:
        if self._unused is None:
            alone = [_Kept(torch.UntypedStorage(1, device="cpu"), 1, 0)]
            for one in alone:  # as in `take`
                self._unused = one.references()
        return kept.references() == self._unused and not weakref.getweakrefcount(kept.storage)

    def _forked(self) -> None:
        self._lock = threading.Lock()  # another thread may have held it
