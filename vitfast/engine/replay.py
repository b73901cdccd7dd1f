"""Native calls recorded once and run again as one, as CUDA graphs do for a GPU.

Between two kernels of a block Python and torch take as long as a small kernel does. Where a
function of tensors does nothing but allocate, take views and call kernels, which a dispatch mode
of torch sees, the calls are all there is to it: they are run again without it, on the addresses of
other tensors, their intermediates in one piece of memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from operator import index
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vitfast.runtime import native
from vitfast.runtime.recordings import ALLOCATIONS, lay_out, storages, under

_IN_BUFFER, _REACH = 1 << 62, 1 << 44
"""As in csrc/bindings/replay.h: how a replay tells a buffer from memory that stays where it is."""
_LEAST_ADDRESS = 1 << 32
"""Integers below 2^32 are sizes; if a buffer lies below, nothing is recorded."""
_ALIGNMENT = 64
"""Of buffers, in bytes: a cache line."""

NativeCall = tuple[str, tuple[Any, ...]]
"""A function of the extension and its arguments."""
Interval = tuple[int, int]


class Replay:
    """The calls of a function of contiguous tensors. What they read besides has to stay."""

    def __init__(self, calls: Any, shape: torch.Size, dtype: torch.dtype) -> None:
        self._calls, self._shape, self._dtype = calls, shape, dtype

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """As the function; the tensors are like those that it was recorded with."""
        out = native.empty(self._shape, self._dtype)
        native.native()  # sees to the instruction set
        self._calls.run([*map(native.address, inputs), out.data_ptr()])
        return out


def record(
    function: Callable[..., torch.Tensor | None], *inputs: torch.Tensor
) -> tuple[torch.Tensor | None, Replay | None]:
    """function(*inputs), and its replay; None where it computes by other means than kernels."""
    if is_recording() or not all(t.is_contiguous() for t in inputs):
        return function(*inputs), None
    recorder, watch = _Recorder(native.native()), _Watch()
    out = under(watch, native.recorder, recorder, lambda: function(*inputs))
    if out is None or recorder.strange or watch.computes:
        return out, None
    return out, _replay(inputs, out, watch.allocated, recorder.calls)


def is_recording() -> bool:
    """Whether this thread records now, which it can do for one function at a time."""
    return native.recorder.get() is not None


class _Recorder:
    """The extension, which notes what the thread that made this calls."""

    def __init__(self, module: Any) -> None:
        self._module, self._thread = module, threading.get_ident()
        self.calls: list[NativeCall] = []
        self.strange = False  # whether it called anything that cannot be run again

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if threading.get_ident() != self._thread:  # it may inherit the context
            return found
        if not hasattr(self._module.Replay, name):
            self.strange = True
            return found

        def call(*args: Any) -> Any:
            self.calls.append((name, args))
            return found(*args)

        return call


class _Watch(TorchDispatchMode):
    """Notes what torch does on this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[torch.Tensor] = []
        self.computes = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ALLOCATIONS:
            self.allocated.append(out)
        elif not self.computes:
            self.computes = func._schema.is_mutable or not storages(out) <= storages(args)
        return out


def _interval(t: torch.Tensor) -> Interval:
    return t.data_ptr(), t.data_ptr() + t.numel() * t.itemsize


def _replay(
    inputs: Sequence[torch.Tensor],
    out: torch.Tensor,
    allocated: Sequence[torch.Tensor],
    calls: Sequence[NativeCall],
) -> Replay | None:
    temporaries = [_interval(t) for t in allocated if t.numel()]
    result = _interval(out)
    if result not in temporaries or not out.is_contiguous():
        return None
    temporaries.remove(result)
    given = [*map(_interval, inputs), result]
    buffers = [*given, *temporaries]
    if min(buffers)[0] < _LEAST_ADDRESS:
        return None
    users: list[list[int]] = [[] for _ in buffers]

    def moved(value: Any, call: int) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(moved(one, call) for one in value)
        if isinstance(value, native.Address):
            value = index(value)
        if isinstance(value, int) and value >= _LEAST_ADDRESS:
            for i, (begin, end) in enumerate(buffers):
                if begin <= value < end:
                    users[i].append(call)
                    return _IN_BUFFER + i * _REACH + value - begin
        return value

    written = [(name, moved(args, i)) for i, (name, args) in enumerate(calls)]
    sizes = [end - begin for begin, end in temporaries]
    offsets, total = lay_out(sizes, users[len(given) :], _ALIGNMENT)
    recorded = native.native().Replay(total, offsets)
    for name, args in written:
        getattr(recorded, name)(*args)
    return Replay(recorded, out.shape, out.dtype)
