"""A device for graphs where no GPU is: it captures torch's ops on the CPU and runs them again.

As on a GPU, what is captured is what was computed and the memory that it was computed in, by
address: Python does not run in a replay, a tensor put in another's place is not seen, and memory
that nobody keeps must not be read. Unlike on a GPU, what is captured executes.
"""

from __future__ import annotations

import contextlib
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from vitfast.graphs import device

SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")
"""Ops that wait for what a GPU computes, which a capture forbids."""


class CaptureError(RuntimeError):
    """As of a CUDA call that is not permitted while a stream is captured."""


class FreedMemoryError(AssertionError):
    """A replay read memory that nobody had kept."""


class _Recording(TorchDispatchMode):
    """The ops that are called within, with the memory of their tensors."""

    def __init__(self):
        super().__init__()
        self.steps, self.made, self.foreign = [], set(), {}

    def _alias(self, value):
        """The tensor's memory, which stays that whatever the tensor becomes."""
        if not isinstance(value, torch.Tensor):
            return value
        if value.untyped_storage().data_ptr() not in self.made:
            self.foreign[id(value)] = weakref.ref(value)
        return value.detach()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in func.name() for name in SYNCS):
            raise CaptureError(f"{func.name()}: operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        given = tree_map(self._alias, (args, kwargs))
        result = func(*args, **kwargs)
        outputs = [t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)]
        self.made.update(t.untyped_storage().data_ptr() for t in outputs)
        self.steps.append((func, given, [t.detach() for t in outputs]))
        return result


class FakeGraph:
    """Ops to run again, on the memory that they had."""

    def __init__(self, owner, recording):
        self._owner = owner
        self._steps, self._foreign = recording.steps, list(recording.foreign.values())

    def replay(self):
        self._owner.log.append("replay")
        if self._owner.fail_replay:
            raise RuntimeError("CUDA error: out of memory\nmore lines")
        if any(ref() is None for ref in self._foreign):
            raise FreedMemoryError
        for func, (args, kwargs), outputs in self._steps:
            found = [t for t in tree_flatten(func(*args, **kwargs))[0] if torch.is_tensor(t)]
            for out, now in zip(outputs, found, strict=True):
                if out.data_ptr() != now.data_ptr():
                    out.copy_(now)


class FakeRecorder:
    """A Recorder whose graphs are FakeGraph."""

    def __init__(self):
        self.log, self.streams = [], []
        self.capturing = False
        self.fail_capture: Exception | None = None
        self.fail_replay = False
        self.graphs = weakref.WeakSet()

    def is_capturing(self):
        return self.capturing

    def follow(self, inputs):
        self.log.append("follow")

    def warm_up(self, run, times):
        for _ in range(times):
            self.log.append("warm up")
            run()

    def capture(self, run):
        self.log.append("capture")
        if self.fail_capture is not None:
            raise self.fail_capture
        self.capturing = True
        try:
            with _Recording() as recording:
                result = run()
        finally:
            self.capturing = False
        graph = FakeGraph(self, recording)
        self.graphs.add(graph)
        return graph, result

    def count(self, what):
        return self.log.count(what)


@pytest.fixture
def fake(monkeypatch):
    """The one recorder of all models on the CPU in a test; there is none on other devices."""
    recorder = FakeRecorder()
    monkeypatch.setattr(
        device, "recorder_for", lambda where: recorder if where.type == "cpu" else None
    )
    monkeypatch.setattr(device, "on", lambda where: contextlib.nullcontext())
    return recorder


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield
