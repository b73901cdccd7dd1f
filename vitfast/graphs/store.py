"""The graphs of one model: which call is replayed, which captured, which left to the model."""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from vitfast.engine.eligibility import is_observed
from vitfast.engine.products.weights import CACHE
from vitfast.errors import first_line
from vitfast.graphs import device as devices
from vitfast.graphs.guard import Guard, reason_against
from vitfast.graphs.values import (
    Unstructured,
    describe,
    flatten,
    layout_of,
    overlaps_itself,
    unflatten,
)
from vitfast.runtime.ambient import ambient
from vitfast.testing.errors import same_bits

_MOST_KINDS = 1024
"""Kinds of calls that are remembered, nearly all of them without a graph."""
_CAPTURING = threading.Lock()
"""A process may capture one graph at a time."""
_OUTER = threading.local()
"""`busy`: this thread is in the call of a graphed model that warms up or is being captured."""
Plain = Callable[..., Any]


class Options(NamedTuple):
    """As the arguments of `vitfast.graphed`."""

    methods: tuple[str, ...]
    limit: int
    warm_up: int
    clone_outputs: bool


class Refused(Exception):
    """Calls of a kind that can never be replayed, and why."""


class _Call(NamedTuple):
    """A call of a method, taken apart."""

    method: str
    structure: Hashable
    tensors: list[torch.Tensor]
    key: Hashable

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def run(self, plain: Plain, tensors: list[torch.Tensor]) -> Any:
        """The method's result for other tensors of the same layout."""
        args, kwargs = unflatten(self.structure, iter(tensors))
        return plain(*args, **kwargs)

    def __str__(self) -> str:
        shown = (f"{str(t.dtype)[6:]}{list(t.shape)}" for t in self.tensors)
        return f"{self.method}{describe(self.structure, shown)}"


class _Captured:
    """A graph with the tensors that it reads its inputs from and leaves its results in."""

    def __init__(self, graph: devices.Graph, inputs: list[torch.Tensor], result: Any) -> None:
        self.graph, self.inputs = graph, inputs
        leaves: list[torch.Tensor] = []
        try:
            self._structure = flatten(result, leaves)
        except Unstructured as what:
            raise Refused(f"its result holds {what}") from None
        self._outputs = list({id(t): t for t in leaves}.values())
        self._places = [next(i for i, t in enumerate(self._outputs) if t is o) for o in leaves]

    def launch(self, tensors: list[torch.Tensor]) -> None:
        for own, given in zip(self.inputs, tensors, strict=True):
            own.copy_(given, non_blocking=True)
        self.graph.replay()

    def result(self, clone: bool) -> Any:
        outputs = [t.clone() for t in self._outputs] if clone else self._outputs
        return unflatten(self._structure, iter([outputs[i] for i in self._places]))


class _Kind:
    """Calls with the same key."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.captured: _Captured | None = None
        self.refused = ""
        self.seen = 0  # calls without a graph, since there last was one
        self.lost = 0  # graphs that were dropped: evicted, or of a model that changed
        self.replays = 0

    def is_due(self) -> bool:
        """Whether the next call is worth a graph, which costs as much as several calls.

        One-off shapes (the last batch of an epoch) never are. More shapes in turn than there is
        room for, or a model that changes again and again, would have each graph dropped before it
        is used: each loss makes the kind wait four times as long, up to 256 calls.
        """
        return not self.refused and self.seen >= self.wait()

    def wait(self) -> int:
        """Calls without a graph before one is captured."""
        return 4 ** min(self.lost, 4)

    def drop(self) -> None:
        self.captured, self.seen, self.lost = None, 0, self.lost + 1


class Store:
    """All that is kept of one graphed model."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._module: weakref.ref[nn.Module] | None = None
        self._lock = threading.RLock()
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()
        self._recorders: dict[torch.device, devices.Recorder | None] = {}
        self._guard: Guard | None = None

    def __reduce__(self) -> tuple[type[Store], tuple[Options]]:
        return type(self), (self.options,)  # copies and pickles start anew

    def __call__(
        self, module: nn.Module, method: str, plain: Plain, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """plain(*args, **kwargs), which is the module's own method, or what a replay gives."""
        call = self._taken(module, method, args, kwargs)
        if call is None:
            return plain(*args, **kwargs)
        with devices.on(call.device):
            kind, found = self._recall(module, call, plain)
        if found is not None:
            return found[0]
        result = plain(*args, **kwargs)
        if kind is not None:
            kind.seen += 1
        return result

    def forget(self) -> None:
        """Drop all graphs, their memory, and what is known of calls."""
        with self._lock:
            self._kinds.clear()
            self._recorders.clear()
            self._guard = None

    def describe(self) -> str:
        """A line for each kind of call."""
        lines = []
        with self._lock:
            for kind in self._kinds.values():
                if kind.captured is not None:
                    how = f"a graph, replayed {kind.replays} times"
                else:
                    why = kind.refused or self._why_waiting(kind)
                    how = f"without a graph: {why}"
                lines.append(f"{kind.name}: {how}")
        return "\n".join(lines) or "no call yet that could have a graph"

    def _why_waiting(self, kind: _Kind) -> str:
        module = None if self._module is None else self._module()
        why = "" if module is None else self._reason(module)
        return why or f"{kind.seen} of {kind.wait()} calls before one is captured"

    def _reason(self, module: nn.Module) -> str:
        return next((w for d in self._recorders if (w := reason_against(module, d))), "")

    def _taken(self, module: nn.Module, method: str, args: Any, kwargs: Any) -> _Call | None:
        """The call, if graphs are possible as far as its arguments and the thread's state tell."""
        if getattr(_OUTER, "busy", False) or module.training or not self.is_of(module):
            return None
        tensors: list[torch.Tensor] = []
        try:
            structure = flatten((args, kwargs), tensors)
            if not tensors or self._recorder(tensors[0].device) is None or is_observed(*tensors):
                return None
            layouts = tuple(map(layout_of, tensors))
        except Unstructured:
            return None
        device = tensors[0].device
        if any(t.device != device for t in tensors):
            return None
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return None
        return _Call(
            method, structure, tensors, (method, structure, layouts, device, ambient(device))
        )

    def is_of(self, module: nn.Module) -> bool:
        """Whether this is the module's own: that of the first which asks. A shallow copy shares it
        with what it is a copy of."""
        if self._module is None:
            self._module = weakref.ref(module)
        return self._module() is module

    def _recorder(self, device: torch.device) -> devices.Recorder | None:
        if device not in self._recorders:
            self._recorders[device] = devices.recorder_for(device)
        return self._recorders[device]

    def _recall(
        self, module: nn.Module, call: _Call, plain: Plain
    ) -> tuple[_Kind | None, tuple[Any] | None]:
        """The kind of a call, and its result by a graph; None where it has none."""
        with self._lock:
            recorder = self._recorder(call.device)
            if recorder is None or recorder.is_capturing():
                return None, None
            kind = self._kind(call)
            if kind.captured is None and not (kind.is_due() and self._capture(module, call, plain)):
                return kind, None
            return kind, self._replay(module, call, kind, recorder)

    def _kind(self, call: _Call) -> _Kind:
        kind = self._kinds.get(call.key)
        if kind is None:
            kind = self._kinds[call.key] = _Kind(str(call))
            if len(self._kinds) > _MOST_KINDS + self.options.limit:
                oldest = next(k for k, known in self._kinds.items() if known.captured is None)
                del self._kinds[oldest]
        self._kinds.move_to_end(call.key)
        return kind

    def _replay(
        self, module: nn.Module, call: _Call, kind: _Kind, recorder: devices.Recorder
    ) -> tuple[Any] | None:
        captured, guard = kind.captured, self._guard
        assert captured is not None and guard is not None  # there is no graph without its guard
        if torch.is_grad_enabled() and guard.requires_grad():
            return None
        if not guard.is_in_place():
            self._drop_all()
            return None
        recorder.follow(captured.inputs)
        try:
            captured.launch(call.tensors)
        except Exception as error:
            self._refuse(kind, f"its replay failed: {_told(error)}")
            return None
        # While the GPU computes; what it computes from is alive, and nobody has the result yet.
        if not guard.is_same(module):
            self._drop_all()
            return None
        kind.replays += 1
        return (captured.result(self.options.clone_outputs),)

    def _capture(self, module: nn.Module, call: _Call, plain: Plain) -> bool:
        """Whether there is a graph of such calls now."""
        recorder, kind = self._recorder(call.device), self._kinds[call.key]
        assert recorder is not None
        if _records(module) or reason_against(module, call.device):
            kind.drop()  # to be asked again some calls later
            return False
        if not _CAPTURING.acquire(blocking=False):
            return False
        try:
            with _alone():
                kind.captured = self._captured(module, call, plain, recorder)
        except Refused as why:
            self._refuse(kind, str(why))
        except torch.OutOfMemoryError as error:
            self._drop_all()  # whoever calls next needs the room
            self._refuse(kind, _told(error))
        except Exception as error:
            self._refuse(kind, f"it cannot be captured: {_told(error)}")
        finally:
            _CAPTURING.release()
        if kind.captured is not None:
            self._evict()
        return kind.captured is not None

    def _captured(
        self, module: nn.Module, call: _Call, plain: Plain, recorder: devices.Recorder
    ) -> _Captured:
        if any(map(overlaps_itself, call.tensors)):
            raise Refused("elements of an input share their memory")
        inputs = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
                  for t in call.tensors]  # fmt: skip
        for own, given in zip(inputs, call.tensors, strict=True):
            own.copy_(given)
        recorder.follow(inputs)
        # Kernels are compiled and chosen, and what a module keeps of its first call is made.
        recorder.warm_up(lambda: call.run(plain, inputs), self.options.warm_up)
        if not all(map(same_bits, inputs, call.tensors)):
            raise Refused("it writes to its inputs")
        if self._guard is not None and not self._guard.is_same(module):
            self._drop_all()
        guard = self._guard or Guard(module)
        with CACHE.noting() as kept:
            graph, result = recorder.capture(lambda: call.run(plain, inputs))
        if kept:
            raise Refused("what it computes with is kept, made from weights that may change")
        if not guard.is_same(module):
            raise Refused("its forward changes the model")
        captured = _Captured(graph, inputs, result)
        self._guard = guard
        return captured

    def _evict(self) -> None:
        """Keep to the limit; what was called last stays."""
        held = [kind for kind in self._kinds.values() if kind.captured is not None]
        for oldest in held[: max(0, len(held) - self.options.limit)]:
            oldest.drop()

    def _drop_all(self) -> None:
        for kind in self._kinds.values():
            if kind.captured is not None:
                kind.drop()
        self._guard = None

    def _refuse(self, kind: _Kind, why: str) -> None:
        kind.captured, kind.refused = None, why
        warnings.warn(
            f"vitfast.graphed: {kind.name} runs without a graph: {why}",
            RuntimeWarning,
            stacklevel=2,
        )


def _records(module: nn.Module) -> bool:
    """Whether autograd would record what the module computes of inputs that need no gradient."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Within, graphed models in the model run plainly, and autocast keeps no cast of a weight: it
    would be from before the graph, and gone when autocast ends."""
    enabled = torch.is_autocast_cache_enabled()
    _OUTER.busy = True
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
        _OUTER.busy = False


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
