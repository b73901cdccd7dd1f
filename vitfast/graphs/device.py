"""What graphs need of a GPU: capture, replay, streams and one pool of memory. Nothing else here
calls torch.cuda, so that tests can put a device of their own in its place."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch


class Graph(Protocol):
    """Kernels that were captured, with the addresses that they read and write."""

    def replay(self) -> None:
        """Launch them again, on the current stream; nothing of Python runs."""


class Recorder(Protocol):
    """The side stream and the memory pool of one model's graphs on one device.

    Graphs that share a pool may use the same memory for what they hold in between: they must not
    run at the same time, which `follow` sees to.
    """

    def is_capturing(self) -> bool:
        """Whether the current stream is being captured, by whomever."""

    def follow(self, inputs: Sequence[torch.Tensor]) -> None:
        """Let the current stream wait for that on which a graph of the pool ran last.

        Args:
            inputs: tensors that the graph which runs next reads, allocated on another stream maybe.
        """

    def warm_up(self, run: Callable[[], Any], times: int) -> None:
        """run() so often on the side stream, in the current stream's order."""

    def capture(self, run: Callable[[], Any]) -> tuple[Graph, Any]:
        """The graph of what run() launches, which does not execute, and what run() gave.

        Raises:
            Exception: whatever run() raises, or what it does cannot be captured. Nothing is being
                captured any more by then.
        """


class CudaRecorder:
    """A Recorder by torch.cuda, of NVIDIA's and AMD's GPUs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._side = torch.cuda.Stream()
        self._pool: Any = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._last: torch.cuda.Stream | None = None

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def follow(self, inputs: Sequence[torch.Tensor]) -> None:
        current = torch.cuda.current_stream(self._device)
        if self._last is not None and current != self._last:
            current.wait_stream(self._last)
            for t in inputs:
                t.record_stream(current)
        self._last = current

    def warm_up(self, run: Callable[[], Any], times: int) -> None:
        current = torch.cuda.current_stream(self._device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            for _ in range(times):
                run()
        current.wait_stream(self._side)

    def capture(self, run: Callable[[], Any]) -> tuple[Graph, Any]:
        if not self._graphs:  # torch takes no pool that has lost its last graph
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may go on allocating: a data loader pins memory whenever it likes.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"
            ):
                result = run()
        except BaseException:
            with contextlib.suppress(Exception):
                graph.reset()
            raise
        self._graphs.add(graph)
        return graph, result


def recorder_for(device: torch.device) -> Recorder | None:
    """A new Recorder of a device; None where there are no graphs."""
    return CudaRecorder(device) if device.type == "cuda" else None


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes the device the current one within."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
