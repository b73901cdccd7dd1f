"""Blocks on a GPU in inference: the ops' kernels from one recorded list a block.

The first calls of a kind go through the ops; the third is recorded (`runtime.launch_lists`), and
those after it issue the list, as long as nothing has changed that it depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from vitfast.engine.memo import Memo
from vitfast.engine.products.weights import CACHE
from vitfast.plans import Called, Computed
from vitfast.runtime import kernel_calls, launches, library, native, triton
from vitfast.runtime.ambient import ambient
from vitfast.runtime.launch_lists import LaunchList, record

_MOST_KINDS = 8
"""Kinds of calls, by shapes and settings, of which a block keeps lists at once."""
_RECORDED = 2
"""Calls of a kind before the one that is recorded: kernels are compiled in the first."""


class _Kind:
    """What is known of one kind of call.

    places: where the plan's tensors lay at the first. settled: nothing is recorded any more.
    """

    def __init__(self, memo: Memo) -> None:
        module = native.extension()
        self.places = (_Places if module is None else module.Places)(memo.tensors)
        self.settled = _calls_modules(memo.plan)
        self.calls = 0
        self.list: LaunchList | None = None


def through_list(
    run: Callable[..., torch.Tensor], x: torch.Tensor, plan: Any, *others: Any, **named: Any
) -> torch.Tensor:
    """run(x, plan, *others, **named), by its list where it has one.

    `run` computes by the public ops, of x, tensors among the others, and the plan's. It does the
    same in each call with such arguments, of which those that are no tensors can be hashed.
    """
    memo: Memo | None = getattr(plan, "memo", None)
    if (
        memo is None
        or torch.is_grad_enabled()
        or not (x.is_cuda or triton.interpreting())
        or getattr(plan, "drops", False)
        or not memo.is_of(plan)
        or _is_watched()
    ):
        return run(x, plan, *others, **named)
    values = (x, *others, *named.values())
    inputs = [value for value in values if isinstance(value, torch.Tensor)]
    key = (
        run,
        *named,
        *[
            (v.shape, v.stride(), v.dtype, v.device, v.data_ptr() % 16)
            if isinstance(v, torch.Tensor) else v
            for v in values
        ],
        ambient(x.device),
    )  # fmt: skip
    kind: _Kind | None = memo.lists.get(key)
    # Kept until the list has run, whatever another thread assigns to a weight's `data` meanwhile.
    storages = kind and kind.places.storages(memo.tensors)
    if kind is None or storages is None:
        _meet(memo, key)
        return run(x, plan, *others, **named)
    if kind.list is not None:
        try:
            return kind.list(*inputs)
        except Exception as error:
            if not triton.is_launch_failure(error):
                raise
            kind.list = None  # for the ops to say what cannot be launched
    kind.calls += 1
    if kind.settled or kind.calls < _RECORDED:
        return run(x, plan, *others, **named)
    kind.settled = True
    with CACHE.noting() as kept:
        out, found = record(lambda: run(x, plan, *others, **named), inputs, memo.tensors)
    if not kept:
        kind.list = found
    CACHE.note(*kept)  # for whoever asks around this: it computes with what was made of weights
    return out


def _meet(memo: Memo, key: Hashable) -> None:
    """Note the first call of a kind, or the first after a weight has moved."""
    kinds = list(memo.lists.items())  # at once: other threads add to it, too
    for other, kind in kinds:
        if kind.places.storages(memo.tensors) is None:  # its list reads, and keeps, what they were
            memo.lists.pop(other, None)
    for oldest, _ in kinds[: max(0, len(memo.lists) - _MOST_KINDS + 1)]:
        memo.lists.pop(oldest, None)
    memo.lists[key] = _Kind(memo)


class _Places:
    """The extension's Places, where there is no extension."""

    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self._facts = self._read(tensors)

    def storages(self, tensors: tuple[torch.Tensor, ...]) -> list[Any] | None:
        found = [t.untyped_storage() for t in tensors]
        return found if self._read(tensors) == self._facts else None

    @staticmethod
    def _read(tensors: tuple[torch.Tensor, ...]) -> list[Any]:
        return [(t.data_ptr(), t.device, t.dtype, t.shape, t.stride()) for t in tensors]


def _calls_modules(plan: tuple[Any, ...]) -> bool:
    """Whether something in a plan is called as timm calls it: it may do another thing each time."""
    if isinstance(plan, Computed):
        return False
    return isinstance(plan, Called) or any(
        _calls_modules(value) if isinstance(value, tuple) else callable(value) for value in plan
    )


def _is_watched() -> bool:
    """Whether somebody waits to see each op, each launch or each choice of a kernel."""
    return (
        library.is_watched()
        or launches.is_watched()
        or torch._C._autograd._profiler_enabled()
        or kernel_calls.is_profiled()
    )
