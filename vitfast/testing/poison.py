"""Memory that shows its misuse: unwritten outputs are NaN, reads and writes outside are noticed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from vitfast.runtime import native
from vitfast.testing.inputs import rebuilt

ZONE = 64
"""Elements of guard zone on either side of a tensor. A multiple of every vector width, so that an
embedded tensor is as aligned as a fresh one."""


@dataclass(frozen=True)
class Guarded:
    """A tensor inside a larger storage whose other bytes are 0xFF, which is NaN for floats.

    Args:
        name: what to call it in messages.
        tensor: the tensor to pass on.
        storage: every byte of its storage, as uint8.
        begin, end: the bytes from its first element to its last.
        gaps: which of these belong to no element; None where it is dense.
        before: the storage as it was; None where the tensor's own bytes may change.
    """

    name: str
    tensor: torch.Tensor
    storage: torch.Tensor
    begin: int
    end: int
    gaps: torch.Tensor | None
    before: torch.Tensor | None = None

    def check(self) -> None:
        """Raises AssertionError if a byte changed that nobody may have written."""
        outside = [self.storage[: self.begin], self.storage[self.end :]]
        if self.gaps is not None:
            outside.append(self.storage[self.begin : self.end][self.gaps])
        if not all(bool((part == 0xFF).all()) for part in outside):
            raise AssertionError(
                f"{self.name} {list(self.tensor.shape)}, strides {self.tensor.stride()}: memory "
                f"outside the tensor was overwritten, first at element offset {self._offset()} "
                "from its start"
            )
        if self.before is not None and not torch.equal(self.storage, self.before):
            raise AssertionError(f"{self.name} {list(self.tensor.shape)} was overwritten")

    def _offset(self) -> int:
        changed = self.storage != 0xFF
        inside = slice(self.begin, self.end)
        changed[inside] &= self.gaps if self.gaps is not None else False
        return (int(changed.nonzero()[0]) - self.begin) // self.tensor.element_size()


def guard(tensor: torch.Tensor, name: str = "input", shift: int = 0) -> Guarded:
    """A copy of an input, of the same values and strides, between guard zones.

    A kernel that reads outside sees NaN; one that writes anywhere is caught by `Guarded.check`.

    Args:
        tensor: dense tensor of any strides, expanded ones included; on a CPU or a GPU.
        shift: elements to move the start by, to take its alignment away.
    """
    guarded = _embed(name, tensor, ZONE + shift)
    placed = guarded.tensor
    once = tuple(slice(0, 1) if s == 0 else slice(None) for s in tensor.stride())
    with torch.no_grad():
        placed[once].copy_(tensor[once])  # a location that several elements share is written once
    placed.requires_grad_(tensor.requires_grad)
    return dataclasses.replace(guarded, before=guarded.storage.clone())


def guard_all(value: Any, found: list[Guarded], name: str = "input") -> Any:
    """`guard` for every dense tensor in nested tuples, lists and dicts; appends to `found`."""
    if isinstance(value, torch.Tensor) and value.device.type in _DEVICES:
        found.append(guard(value, name))
        return found[-1].tensor
    if isinstance(value, dict):
        return {k: guard_all(v, found, f"{name}.{k}") for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return rebuilt(value, (guard_all(v, found, f"{name}[{i}]") for i, v in enumerate(value)))
    return value


_DEVICES = ("cpu", "cuda")
_FACTORIES = ((torch, ("empty", "empty_like", "empty_strided", "empty_permuted")),
              (torch.Tensor, ("new_empty", "new_empty_strided")))  # fmt: skip


@contextlib.contextmanager
def poisoned_memory() -> Iterator[list[Guarded]]:
    """Inside, PyTorch's uninitialised tensors are NaN (0xFF bytes) and stand between guards.

    An output element that no kernel wrote is then NaN, whatever the allocator had left there. On
    leaving, the guard zones of everything allocated are checked. Not for use under torch.compile.

    Yields:
        The allocations so far.

    Raises:
        AssertionError: on leaving, if something was written outside an allocation.
    """
    native.RESULTS.clear()  # memory that is used again is not allocated
    allocated: list[Guarded] = []
    saved = []
    for owner, names in _FACTORIES:
        for name in names:
            original = getattr(owner, name)
            saved.append((owner, name, original, name in vars(owner)))
            setattr(owner, name, _poisoning(original, name, allocated))
    try:
        yield allocated
    finally:
        for owner, name, original, own in saved:
            setattr(owner, name, original) if own else delattr(owner, name)
    for guarded in allocated:
        guarded.check()


def _poisoning(original: Callable[..., Any], name: str, allocated: list[Guarded]) -> Any:
    def factory(*args: Any, **kwargs: Any) -> torch.Tensor:
        fresh = original(*args, **kwargs)
        if (
            kwargs.get("out") is not None
            or isinstance(fresh, FakeTensor)
            or fresh.device.type not in _DEVICES
            or fresh.layout != torch.strided
        ):
            return fresh
        allocated.append(_embed(f"torch.{name}", fresh, ZONE))
        return allocated[-1].tensor.requires_grad_(fresh.requires_grad)

    return factory


_empty = torch.empty


def _embed(name: str, like: torch.Tensor, offset: int) -> Guarded:
    """A tensor of this size, stride and dtype in a storage of 0xFF bytes."""
    size, stride, width = like.size(), like.stride(), like.element_size()
    span = 0 if 0 in size else 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    device = like.device
    storage = _empty((offset + span + ZONE) * width, dtype=torch.uint8, device=device).fill_(0xFF)
    placed = _empty(0, dtype=like.dtype, device=device)
    # set_ rather than a view: outputs of autograd functions must not look like views of something.
    with torch.no_grad():
        placed.set_(storage.untyped_storage(), offset, size, stride)
    gaps = None
    if like.numel() < span or 0 in stride:
        gaps = torch.ones(span, dtype=torch.bool, device=device)
        gaps[_positions(size, stride).to(device)] = False
        gaps = gaps.repeat_interleave(width)
    return Guarded(name, placed, storage, offset * width, (offset + span) * width, gaps)


def _positions(size: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    """Offsets of the elements from the first one, in elements."""
    positions = torch.zeros(1, dtype=torch.int64)
    for n, s in zip(size, stride, strict=True):
        if s != 0:
            positions = (positions[:, None] + torch.arange(n) * s).flatten()
    return positions
