"""What a block found out in its last calls, for as long as nothing changes that it depends on.

To look at a block's children, to check what they hold, to prepare its products and to call one
kernel after the other from Python takes ten times as long as to see that all of it is as it was:
the children's classes and what is in their dictionaries, what their forwards call, and the state of
the tensors as `ops._weight_cache` tells it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from vitfast.engine import originals
from vitfast.engine.eligibility import Plan, is_unwatched, may_fuse, plan_call, planned
from vitfast.engine.products import weights
from vitfast.engine.replay import Replay, is_recording, record
from vitfast.plans import Unfit, tensors_in
from vitfast.runtime import native
from vitfast.runtime.library import autocast_dtype
from vitfast.settings import settings

_MOST_KINDS = 8
"""Shapes and dtypes of inputs that a block is ready for at once."""
_MOST_VAIN = 16
"""How many more times than it was of use a memo is made anew before the block goes without one."""
_NAME = "_vitfast_memos"
"""The attribute of a module that its memos are; `ModuleState` looks past it."""
Made = TypeVar("Made")


class _Sources:
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

    def same(self, module: nn.Module) -> bool:
        if not self.state.same(module):
            return False
        return not self.buffers or all(t._version == version for t, version in self.buffers)


class _Memos(dict[Callable[[Any], Any], "_Memo"]):
    """What plan functions found for one module. It lies among the module's own attributes: they die
    together, even where something kept here refers back to the module. Copies start anew."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = weakref.ref(module)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return dict, ()  # whoever loads it needs no vitfast


class _Memo:
    """What one plan function found for one module."""

    def __init__(self) -> None:
        self.found: _Found | None = None
        self.vain = 0

    def may_learn(self) -> bool:
        return self.vain < _MOST_VAIN

    def learn(self, module: nn.Module, plan: Any, sources: _Sources | None) -> None:
        """Keep a plan, unless it holds tensors that are not the module's own, but computed.

        sources: as they were before the plan was made, so that what another thread changed
        meanwhile shows at the next call; None to keep nothing.
        """
        self.found = None
        self.vain += 1
        if sources is None or plan is None or not sources.can_tell:
            return
        tensors = tuple(tensors_in((plan,)))
        if all(id(t) in sources.own for t in tensors):
            self.found = _Found(module, plan, sources, tensors)


class _Found:
    """A plan, the sources that it came from, its tensors and what was made from it."""

    def __init__(
        self, module: nn.Module, plan: Any, sources: _Sources, tensors: tuple[torch.Tensor, ...]
    ) -> None:
        self.module = weakref.ref(module)
        self.plan, self.sources, self.tensors = plan, sources, tensors
        self.made: dict[Hashable, _Made] = {}
        self._storages: list[weakref.ref[torch.UntypedStorage]] = []
        _FOUND[id(plan)] = weakref.ref(self, partial(_drop_found, id(plan)))

    def make(self, key: Hashable, make: Callable[[], Any]) -> _Made:
        watchable = all(map(_is_watchable, self.tensors))
        # Before anything is read: another thread may write to a tensor while this one packs it.
        before = weights.state(self.tensors) if watchable else None
        with weights.CACHE.noting() as noted:
            made = _Made(make())
        tensors = tuple({id(t): t for t in (*self.tensors, *noted)}.values())
        if watchable and all(map(_is_watchable, tensors)):
            made.tensors = tensors
            made.state = weights.state(tensors, {id(t) for t in noted})
            if not weights.same(before, self.tensors, fully=True):
                return made
            kinds = list(self.made)  # at once: other threads add to it, too
            for oldest in kinds[: max(0, len(kinds) - _MOST_KINDS + 1)]:
                self.made.pop(oldest, None)
            self.made[key] = made
            self._watch_storages()
        return made

    def _watch_storages(self) -> None:
        """Let go what was made of weights when one of them moves elsewhere."""
        drop = partial(_drop_made, weakref.ref(self))
        self._storages = [weakref.ref(t.untyped_storage(), drop) for t in self.tensors]

    def complain(self, edited: torch.Tensor) -> None:
        """Warn of an edit that was found late, and forget all that was made before it."""
        self.made.clear()
        weights.CACHE.forget(edited)
        module = self.module()
        names = [] if module is None else [n for n, p in module.named_parameters() if p is edited]
        what = f"{type(module).__name__}.{names[0]}" if names else "a weight"
        weights.warn_edited(what)


class _Made:
    """What was made for one kind of input."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.tensors: tuple[torch.Tensor, ...] = ()
        self.state: Any = None  # that of the tensors
        self.has_run = self.was_recorded = False
        self.tape: Replay | None = None
        # The tensors' storages, for whose elements nobody looks any more (`settings.weights`).
        self.frozen: tuple[torch.UntypedStorage, ...] | None = None


_FOUND: dict[int, weakref.ref[_Found]] = {}  # by the id of its plan


def recall_plan(
    find: Callable[[Any], Plan], module: nn.Module, x: object, *others: object
) -> Plan | None:
    """As `_guard.ready`, with the plan found before while the module and its children are the same.

    For plan functions that look at nothing else.
    """
    if torch.compiler.is_compiling() or native.reasons():
        return plan_call(find, module, x, *others)
    memos = module.__dict__.get(_NAME)
    memo = None if memos is None else memos.get(find)
    found = None if memo is None else memo.found
    held = () if found is None else found.tensors
    # Whoever assigns to a weight's `data` may leave there what no kernel can read.
    fits = is_unwatched(x, *others, *held)
    if not fits and not may_fuse(x, *others):
        return None
    if (
        memo is not None
        and found is not None
        and found.sources.same(module)
        and (fits or all(map(native.is_readable, held)))
    ):
        memo.vain = 0
        return found.plan  # type: ignore[no-any-return]
    if type(memos) is not _Memos or memos.module() is not module:  # that of what it is a copy of
        memo, memos = None, _Memos(module)
        module.__dict__[_NAME] = memos
    sources = _Sources(module) if memo is None or memo.may_learn() else None
    try:
        plan = planned(find, module)
    except Unfit:
        if memo is not None:
            memo.found = None
        return None
    if memo is None:
        memo = memos[find] = _Memo()
    memo.learn(module, plan, sources)
    return plan


def forget(module: nn.Module) -> None:
    """Keep nothing of a module."""
    module.__dict__.pop(_NAME, None)


def recall(
    make: Callable[..., Made], rows: int, x: torch.Tensor, plan: Any, *others: Hashable
) -> Made:
    """make(x, plan, autocast's dtype or None, *others), or what it gave for such an x before.

    It may depend on the shape, dtype and device of x, and on the plan's tensors, which it may pack
    for so many rows; not on what x holds nor how it lies.
    """
    made, _ = _find(None, make, rows, x, plan, others)
    return made.value  # type: ignore[no-any-return]


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
    such call on as a tape, if it does nothing but call kernels. It depends on nothing else."""
    made, storages = _find(run, make, rows, x, plan, others, besides)
    if made.value is None:
        return None
    inputs = (x, *besides)
    if all(t.is_contiguous() for t in inputs):
        if made.tape is not None and storages is not None:
            return made.tape(*inputs)  # on the addresses of what `storages` keeps
        if made.has_run and not made.was_recorded and not is_recording():
            made.was_recorded = True
            out, made.tape = record(partial(run, made.value), *inputs)
            return out
    made.has_run = True
    return run(made.value, *inputs)


def _find(
    run: Callable[..., Any] | None,
    make: Callable[..., Any],
    rows: int,
    x: torch.Tensor,
    plan: Any,
    others: tuple[Hashable, ...],
    besides: tuple[torch.Tensor, ...] = (),
) -> tuple[_Made, tuple[torch.UntypedStorage, ...] | None]:
    """What was made for such a call, and the storages of the tensors that it was made from; None
    for those if it was made just now."""
    lower = autocast_dtype(x.device)
    ref = _FOUND.get(id(plan))
    found = None if ref is None else ref()
    if found is not None and settings.memory == "low":
        found.made.clear()
        found = None
    if (
        found is None
        or found.plan is not plan
        or rows >= weights.CACHE_ROWS  # packings that are not to be kept
        or torch.is_grad_enabled()
        or not all(t.is_cpu for t in (x, *besides))
    ):
        return _Made(make(x, plan, lower, *others)), None
    how = settings.backend, settings.cpu_isa, torch._C._get_mkldnn_enabled(), native.threads()
    kinds = tuple((t.shape, t.dtype) for t in (x, *besides))
    key = (run, make, kinds, lower, how, *others)
    made = found.made.get(key)
    if made is not None:
        frozen = settings.weights == "frozen"
        if frozen and made.frozen is not None:
            return made, made.frozen
        storages = weights.storages(made.state, made.tensors)
        if storages is not None:
            made.frozen = storages if frozen else None
            return made, storages
        if made.state.edited >= 0:
            found.complain(made.tensors[made.state.edited])
    return found.make(key, lambda: make(x, plan, lower, *others)), None


def _is_watchable(t: torch.Tensor) -> bool:
    plain = t.is_cpu and t.itemsize in (2, 4) and native.is_readable(t)
    return plain and (t.ndim < 3 or weights.is_dense(t))


def _drop_found(plan: int, dead: weakref.ref[_Found]) -> None:
    # The id may be another plan's by now.
    if _FOUND.get(plan) is dead:
        _FOUND.pop(plan, None)


def _drop_made(found: weakref.ref[_Found], gone: object) -> None:
    alive = found()
    if alive is not None:
        alive.made.clear()


def _forget_made() -> None:
    """What the cache has no room for is not to live on here."""
    for ref in list(_FOUND.values()):
        _drop_made(ref, None)


weights.CACHE.when_crowded.append(_forget_made)
