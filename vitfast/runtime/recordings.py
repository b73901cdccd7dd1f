"""What recordings of calls share: a look at all that torch does, and the memory of what is between.

On the CPU `vitfast.engine.replay` records, on GPUs `vitfast.runtime.launch_lists`.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


def under(
    mode: TorchDispatchMode, noted: contextvars.ContextVar[Any], recorder: Any,
    function: Callable[[], T],
) -> T:  # fmt: skip
    """function() with torch's ops seen by a mode, and `noted` the recorder of kernels meanwhile."""

    def watched() -> T:
        noted.set(recorder)
        with mode:
            return function()

    depth = torch._C._len_torch_dispatch_stack()
    try:
        # In a context of its own, which ends with the call however that ends.
        return contextvars.copy_context().run(watched)
    finally:  # an interrupt may have kept torch from taking its mode off
        while torch._C._len_torch_dispatch_stack() > depth:
            _pop_mode()


ALLOCATIONS = frozenset(("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"))
"""torch's ops that give memory with nothing in it."""


def storages(values: Any) -> set[int]:
    """What tells the memory of all tensors among nested values from that of others."""
    return {storage(t) for t in tree_leaves(values) if isinstance(t, torch.Tensor)}


def storage(t: torch.Tensor) -> int:
    """The address of a tensor's storage, or of the tensor where it has none."""
    return t.untyped_storage().data_ptr() if t.layout is torch.strided else id(t)


def lay_out(
    sizes: Sequence[int], users: Sequence[Sequence[int]], alignment: int
) -> tuple[list[int], int]:
    """Where buffers lie in one piece of memory, none over another in use at the same time.

    Args:
        sizes: bytes of each buffer.
        users: for each, the numbers of the steps that use it, in order.
        alignment: of each buffer, in bytes.

    Returns:
        The offset of each, 0 for those that nobody uses, and the size of the piece, at least 1.
    """
    offsets, total = [0] * len(sizes), 1
    placed: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if not users[i]:
            continue
        rivals = [k for k in placed if _meet(users[i], users[k])]
        for k in sorted(rivals, key=lambda k: offsets[k]):
            if offsets[i] + sizes[i] <= offsets[k]:
                break
            end = offsets[k] + sizes[k]
            offsets[i] = max(offsets[i], -(-end // alignment) * alignment)
        placed.append(i)
        total = max(total, offsets[i] + sizes[i])
    return offsets, total


def _meet(a: Sequence[int], b: Sequence[int]) -> bool:
    return a[0] <= b[-1] and b[0] <= a[-1]
