"""What is remembered of a module between calls: its plan, prepared products and recorded calls.

To look at a block's children, to check what they hold, to prepare its products and to call one
kernel after the other from Python takes ten times as long as to see that all of it is as it was. So
a module has a memo for each plan function, valid while a snapshot of it matches: the classes of its
children and what is in their dictionaries, what their forwards call, and the state of the tensors
as `products.weights` tells it. The plan carries the memo's handle (`plan.memo`); without one, as of
a plan made anew or changed, everything is prepared for that call alone.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from vitfast.engine import originals
from vitfast.engine.eligibility import Plan, is_unwatched, may_fuse, plan_call, planned, untrusted
from vitfast.engine.products import weights
from vitfast.engine.replay import Replay, is_recording, record
from vitfast.plans import Unfit, tensors_in
from vitfast.runtime import native
from vitfast.runtime.library import autocast_dtype
from vitfast.settings import settings

_MOST_KINDS = 8
"""Shapes and dtypes of inputs for which a memo keeps products at once."""
_MOST_VAIN = 16
"""A module's plan is no longer kept after so many rebuilds in a row without a hit."""
_NAME = "_vitfast_memos"
"""The attribute of a module that its memos are; `ModuleState` looks past it."""
Made = TypeVar("Made")


class _Snapshot:
    """All that a plan of a module depends on but for the weights' values, as it is now."""

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        calls = originals.calls(frozenset(map(type, modules)))
        self.state = native.native().ModuleState(modules, calls.names)
        buffers = [t for m in modules for t in m._buffers.values() if t is not None]
        self.own = {id(t) for m in modules for t in m._parameters.values()} | set(map(id, buffers))
        # What the plan function may compare: a position index, a mask of windows. One of inference
        # mode does not tell whether something wrote to it.
        self.can_tell = not any(t.is_inference() for t in buffers)
        self.buffers = [(t, t._version) for t in buffers] if self.can_tell else []

    def matches(self, module: nn.Module) -> bool:
        if not self.state.same(module):
            return False
        return not self.buffers or all(t._version == version for t, version in self.buffers)


class _Entries(dict[Callable[[Any], Any], "_Entry"]):
    """What is kept of one module, by plan function. It lies among the module's own attributes: they
    die together, even where something kept here refers back to the module. Copies start anew."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = weakref.ref(module)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return dict, ()  # whoever loads it needs no vitfast


class _Entry:
    """The plan that one plan function made of one module, and its memo; None where not kept.

    The plan refers to the memo, which must not refer to it: both would outlive the module.
    """

    def __init__(self) -> None:
        self.kept: tuple[Any, Memo] | None = None  # in one piece, for threads
        self.vain = 0

    def may_learn(self) -> bool:
        return self.vain < _MOST_VAIN

    def learn(self, module: nn.Module, plan: Any, snapshot: _Snapshot | None) -> Any:
        """Keep a plan, unless it holds tensors that are not the module's own, but computed; gives
        the plan to run with.

        Args:
            snapshot: taken before the plan was made, so that what another thread changed meanwhile
                shows at the next call; None to keep nothing.
        """
        self.kept = None
        self.vain += 1
        if snapshot is None or plan is None or not snapshot.can_tell:
            return plan
        tensors = tuple(tensors_in((plan,)))
        if any(id(t) not in snapshot.own for t in tensors):
            return plan
        memo = Memo(module, plan, snapshot, tensors)
        if hasattr(plan, "memo"):
            plan = plan._replace(memo=memo)
        self.kept = plan, memo
        return plan


class Memo:
    """A plan as it was made, the snapshot it holds for, its tensors, and what was prepared of it.

    prepared: by kind of input: shapes and dtypes, settings, and the functions that prepare and run.
    lists: what `vitfast.blocks.launched` recorded, by kind of call.
    """

    def __init__(
        self, module: nn.Module, plan: Any, snapshot: _Snapshot, tensors: tuple[torch.Tensor, ...]
    ) -> None:
        self.module = weakref.ref(module)
        self.plan, self.snapshot, self.tensors = plan, snapshot, tensors
        self.prepared: dict[Hashable, _Prepared] = {}
        self.lists: dict[Hashable, Any] = {}
        self._storages: list[weakref.ref[torch.UntypedStorage]] = []
        key = id(self)
        _MEMOS[key] = weakref.ref(self, lambda _: _MEMOS.pop(key, None))

    def is_of(self, plan: Any) -> bool:
        """Whether a plan with this handle still is the one it was made of, not a changed copy."""
        return all(map(operator.is_, plan[:-1], self.plan))

    def prepare(self, key: Hashable, make: Callable[[], Any]) -> _Prepared:
        watchable = all(map(_is_watchable, self.tensors))
        # Before anything is read: another thread may write to a tensor while this one packs it.
        before = weights.state(self.tensors) if watchable else None
        with weights.CACHE.noting() as noted:
            prepared = _Prepared(make())
        tensors = tuple({id(t): t for t in (*self.tensors, *noted)}.values())
        if watchable and all(map(_is_watchable, tensors)):
            prepared.tensors = tensors
            prepared.state = weights.state(tensors, {id(t) for t in noted})
            if not weights.same(before, self.tensors, fully=True):
                return prepared
            kinds = list(self.prepared)  # at once: other threads add to it, too
            for oldest in kinds[: max(0, len(kinds) - _MOST_KINDS + 1)]:
                self.prepared.pop(oldest, None)
            self.prepared[key] = prepared
            self._watch_storages()
        return prepared

    def _watch_storages(self) -> None:
        """Let go what was made of weights when one of them moves elsewhere."""
        drop = partial(_drop_prepared, weakref.ref(self))
        self._storages = [weakref.ref(t.untyped_storage(), drop) for t in self.tensors]

    def complain(self, edited: torch.Tensor) -> None:
        """Warn of an edit that was found late, and forget all that was prepared before it."""
        self.prepared.clear()
        weights.CACHE.forget(edited)
        module = self.module()
        names = [] if module is None else [n for n, p in module.named_parameters() if p is edited]
        what = f"{type(module).__name__}.{names[0]}" if names else "a weight"
        weights.warn_edited(what)


class _Prepared:
    """What was prepared for one kind of input."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.tensors: tuple[torch.Tensor, ...] = ()
        self.state: Any = None  # that of the tensors
        self.has_run = self.was_recorded = False
        self.replay: Replay | None = None
        # The tensors' storages, for whose elements nobody looks any more (`settings.weights`).
        self.frozen: tuple[torch.UntypedStorage, ...] | None = None


_MEMOS: dict[int, weakref.ref[Memo]] = {}
"""All there are, for the cache to let go what it has no room for. No WeakSet: one thread may not go
through that while another adds to it."""


def memos() -> list[Memo]:
    """Those of all modules that are alive."""
    return [memo for ref in list(_MEMOS.values()) if (memo := ref()) is not None]


def recall_plan(
    plan: Callable[[Any], Plan], module: nn.Module, x: object, *others: object
) -> Plan | None:
    """plan(module), or None where this call has to run timm's forward, as `plan_call`; made anew
    only where something about the module changed. For plan functions that look at nothing else."""
    if torch.compiler.is_compiling() or native.reasons():
        return plan_call(plan, module, x, *others)
    entries = module.__dict__.get(_NAME)
    entry = None if entries is None else entries.get(plan)
    kept = None if entry is None else entry.kept
    held = () if kept is None else kept[1].tensors
    # Whoever assigns to a weight's `data` may leave there what no kernel can read.
    fits = is_unwatched(x, *others, *held)
    if not (fits or may_fuse(x, *others)) or untrusted(module, x):
        return None
    if (
        entry is not None
        and kept is not None
        and kept[1].snapshot.matches(module)
        and (fits or all(map(native.is_readable, held)))
    ):
        entry.vain = 0
        return kept[0]
    if type(entries) is not _Entries or entries.module() is not module:  # of what it is a copy of
        entry, entries = None, _Entries(module)
        module.__dict__[_NAME] = entries
    snapshot = _Snapshot(module) if entry is None or entry.may_learn() else None
    try:
        made = planned(plan, module)
    except Unfit:
        if entry is not None:
            entry.kept = None
        return None
    if entry is None:
        entry = entries[plan] = _Entry()
    return entry.learn(module, made, snapshot)


def forget(module: nn.Module) -> None:
    """Keep nothing of a module."""
    module.__dict__.pop(_NAME, None)


@contextmanager
def set_aside(modules: Iterable[nn.Module]) -> Iterator[None]:
    """What is kept of these modules is out of reach within, and back afterwards.

    For a change that is taken back at once, such as a hook for one call. Left in place, what is
    kept would be made anew with the change and again without it, and no longer be kept at all after
    a few such calls.
    """
    kept = [(module, module.__dict__.pop(_NAME, None)) for module in modules]
    try:
        yield
    finally:
        for module, entries in kept:
            forget(module)
            if entries is not None:
                module.__dict__[_NAME] = entries


def recall(
    make: Callable[..., Made], rows: int, x: torch.Tensor, plan: Any, *others: Hashable
) -> Made:
    """make(x, plan, autocast's dtype or None, *others), or what it gave for such an x before.

    `make` may depend on the shape, dtype and device of x, and on the plan's tensors, which it may
    pack for so many rows; it must not read x's values or strides.
    """
    prepared, _ = _find(None, make, rows, x, plan, others)
    return prepared.value


def call(
    run: Callable[..., torch.Tensor | None],
    make: Callable[..., Made | None],
    rows: int,
    x: torch.Tensor,
    plan: Any,
    *others: Hashable,
    besides: tuple[torch.Tensor, ...] = (),
) -> torch.Tensor | None:
    """run(recall(make, ...), x, *besides), or None where what is recalled is None; from the third
    such call on a replay of its kernels, if it does nothing but call kernels. `run` may depend on
    nothing else."""
    prepared, storages = _find(run, make, rows, x, plan, others, besides)
    if prepared.value is None:
        return None
    inputs = (x, *besides)
    if all(t.is_contiguous() for t in inputs):
        if prepared.replay is not None and storages is not None:
            return prepared.replay(*inputs)  # on the addresses of what `storages` keeps
        if prepared.has_run and not prepared.was_recorded and not is_recording():
            prepared.was_recorded = True
            out, prepared.replay = record(partial(run, prepared.value), *inputs)
            return out
    prepared.has_run = True
    return run(prepared.value, *inputs)


def _find(
    run: Callable[..., Any] | None,
    make: Callable[..., Any],
    rows: int,
    x: torch.Tensor,
    plan: Any,
    others: tuple[Hashable, ...],
    besides: tuple[torch.Tensor, ...] = (),
) -> tuple[_Prepared, tuple[torch.UntypedStorage, ...] | None]:
    """What was prepared for such a call, and the storages of the tensors that it was made from;
    None for those if it was made just now."""
    autocast = autocast_dtype(x.device)
    memo: Memo | None = plan.memo
    if memo is not None and settings.memory == "low":
        memo.prepared.clear()
        memo = None
    if (
        memo is None
        or not memo.is_of(plan)
        or rows >= weights.CACHE_ROWS  # packings that are not to be kept
        or torch.is_grad_enabled()
        or not all(t.is_cpu for t in besides)
    ):
        return _Prepared(make(x, plan, autocast, *others)), None
    how = settings.backend, settings.cpu_isa, torch._C._get_mkldnn_enabled(), native.threads()
    kinds = tuple((t.shape, t.dtype) for t in (x, *besides))
    key = (run, make, kinds, autocast, how, *others)
    prepared = memo.prepared.get(key)
    if prepared is not None:
        frozen = settings.weights == "frozen"
        if frozen and prepared.frozen is not None:
            return prepared, prepared.frozen
        storages = weights.storages(prepared.state, prepared.tensors)
        if storages is not None:
            prepared.frozen = storages if frozen else None
            return prepared, storages
        if prepared.state.edited >= 0:
            memo.complain(prepared.tensors[prepared.state.edited])
    # Of the plan without a handle: what is prepared may refer to it, and is kept by the memo.
    bare = memo.plan
    return memo.prepare(key, lambda: make(x, bare, autocast, *others)), None


def _is_watchable(t: torch.Tensor) -> bool:
    plain = t.is_cpu and t.itemsize in (2, 4) and native.is_readable(t)
    return plain and (t.ndim < 3 or weights.is_dense(t))


def _drop_prepared(memo: weakref.ref[Memo], gone: object) -> None:
    alive = memo()
    if alive is not None:
        alive.prepared.clear()


def _forget_prepared() -> None:
    """What the cache has no room for is not to live on here."""
    for memo in memos():
        memo.prepared.clear()


weights.CACHE.when_crowded.append(_forget_prepared)
