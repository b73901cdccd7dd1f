"""Arguments and results as a structure that can be compared, and the tensors in it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch

from vitfast.engine.eligibility import PLAIN
from vitfast.runtime.native import is_readable

_CONSTANTS = (
    bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size,
    torch.memory_format,
)  # fmt: skip
_TENSOR = "tensor"
"""What stands in a structure in place of a tensor."""


class Unstructured(TypeError):
    """A value that is neither a tensor nor a constant, nor a plain container of such."""


def flatten(value: Any, tensors: list[torch.Tensor]) -> Hashable:
    """The structure of lists, tuples and dictionaries of tensors and constants.

    Args:
        tensors: the value's tensors are appended, in order.

    Returns:
        What `unflatten` takes. It is equal to that of another value only if containers, their
        keys and constants are, in value and type.

    Raises:
        Unstructured: the value holds something else, a subclass of a tensor's or a container's too.
    """
    kind = type(value)
    if kind in PLAIN:
        tensors.append(value)
        return _TENSOR
    if kind in _CONSTANTS:
        return kind, value
    if kind is list or kind is tuple:
        return kind, tuple([flatten(item, tensors) for item in value])
    if kind is dict:
        if not all(type(key) in (str, int) for key in value):
            raise Unstructured("a dictionary with keys other than names and integers")
        return kind, tuple([(key, flatten(item, tensors)) for key, item in value.items()])
    raise Unstructured(f"a {kind.__module__}.{kind.__qualname__}")


def unflatten(structure: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The value of a structure, with these tensors in their order."""
    if structure == _TENSOR:
        return next(tensors)
    kind, held = structure
    if kind is list or kind is tuple:
        return kind([unflatten(item, tensors) for item in held])
    if kind is dict:
        return {key: unflatten(item, tensors) for key, item in held}
    return held


def describe(structure: Any, tensors: Iterator[Any]) -> str:
    """A structure in short; what stands for the tensors is given, too."""
    if structure == _TENSOR:
        return str(next(tensors))
    kind, held = structure
    if kind is list or kind is tuple:
        inner = ", ".join(describe(item, tensors) for item in held)
        return f"[{inner}]" if kind is list else f"({inner})"
    if kind is dict:
        return "{" + ", ".join(f"{key}: {describe(item, tensors)}" for key, item in held) + "}"
    return repr(held)


def layout_of(t: torch.Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    """Shape, strides and dtype: what a captured kernel has been told of a tensor, but its address.

    Raises:
        Unstructured: its elements are not what lies at its address.
    """
    if t.layout is not torch.strided or not is_readable(t):
        raise Unstructured("a tensor that is not dense and plain")
    return t.shape, t.stride(), t.dtype


def overlaps_itself(t: torch.Tensor) -> bool:
    """Whether two elements may share their memory, as in an expanded tensor."""
    reach = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach += stride * (size - 1)
    return False
