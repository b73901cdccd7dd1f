"""Inputs that are a subclass of torch.Tensor.

A subclass without rules of its own is a name on a tensor: what torch computes from it gets its
class again, and nothing else. A layer takes the name off, runs, and puts it on the result. One
that has rules (fastai's TensorImage, DTensor) sees every operation of timm's forward, as it must.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from vitfast.engine.eligibility import PLAIN
from vitfast.settings import settings

_DEFAULT = torch.Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
_NONE = torch._C._disabled_torch_function_impl
_HARMLESS = {
    "__annotations__", "__deepcopy__", "__dict__", "__doc__", "__firstlineno__", "__format__",
    "__init__", "__init_subclass__", "__module__", "__new__", "__reduce__", "__reduce_ex__",
    "__repr__", "__setstate__", "__slots__", "__static_attributes__", "__str__",
    "__torch_function__", "__weakref__",
}  # fmt: skip
"""What a class may define without a say in any operation; `__torch_function__` is looked at."""


@functools.cache
def is_plain(kind: type[torch.Tensor]) -> bool:
    """Whether operations on this subclass are those on a tensor; warns once a class if not."""
    handler = kind.__torch_function__
    bases = kind.__mro__[: kind.__mro__.index(torch.Tensor)]
    defined = {name for base in bases for name in vars(base)} - _HARMLESS
    rules = defined.intersection(dir(torch.Tensor))
    if not (handler is _NONE or getattr(handler, "__func__", None) is _DEFAULT):
        rules.add("__torch_function__")
    if rules and not kind.__module__.startswith("torch._subclasses"):  # those of torch.compile
        warnings.warn(
            f"swapped layers run timm's forward on inputs of class {kind.__qualname__}, which has "
            f"its own {sorted(rules)[0]}; x.as_subclass(torch.Tensor) would run the fused kernels",
            stacklevel=2,
        )
    return not rules


def kind_of(values: Iterable[object]) -> type[torch.Tensor] | None:
    """The subclass that can be taken off these arguments; None where there is none, or several."""
    kinds = {type(v) for v in values if isinstance(v, torch.Tensor)}.difference(PLAIN)
    if not kinds or settings.disable or not all(map(is_plain, kinds)) or len(kinds) > 1:
        return None
    return kinds.pop()


def run_plain(
    forward: Callable[..., Any], kind: type[torch.Tensor], args: Any, kwargs: dict[str, Any]
) -> Any:
    """forward(*args, **kwargs) on plain tensors; the result has the class that torch gives it."""

    def off(value: Any) -> Any:
        return value.as_subclass(torch.Tensor) if type(value) is kind else value

    def on(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(on, value))
        plain = isinstance(value, torch.Tensor) and not isinstance(value, kind)
        return value.as_subclass(kind) if plain else value

    with torch._C.DisableTorchFunctionSubclass():
        args, kwargs = tuple(map(off, args)), {name: off(v) for name, v in kwargs.items()}
    found = forward(*args, **kwargs)
    if kind.__torch_function__ is _NONE:
        return found
    with torch._C.DisableTorchFunctionSubclass():
        return on(found)
