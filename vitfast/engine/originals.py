"""Whether what timm's forward would call is still torch's and timm's own.

A fused forward calls neither `nn.Linear.forward` nor `torch.nn.functional.linear`: whoever put
something else there, to count, to quantise or to trace, waits for calls that never come. All that
timm's forward of a class calls by name is looked up and compared on every call: the forwards of
classes, methods of its own class, functions of timm's modules and of `torch.nn.functional`. When
first seen it must come from torch or timm, so that it does not matter what was imported first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, ModuleType, WrapperDescriptorType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from vitfast.runtime import native

Place = tuple[Any, str]  # a class or a module, and the name of an attribute
Kinds = frozenset[type[nn.Module]]
_HOMES = frozenset(("torch", "timm", "vitfast")) | sys.stdlib_module_names
_EVERY = ((nn.Module, "__call__"), (nn.Module, "_call_impl"))  # what calls any forward
_ACCESS = ("__call__", "_call_impl", "__getattr__", "__getattribute__")
"""What calls the modules of a class and finds their children and parameters."""


class Calls:
    """What timm's forward of modules of some classes calls.

    `replaced` names one thing among it that is not torch's or timm's own; "" for none. `same()`
    tells whether every name still stands for what it did.
    """

    def __init__(self, kinds: Kinds) -> None:
        found = (place for kind in kinds for place in _places(kind))
        places = tuple(dict.fromkeys((*_EVERY, *found)))
        names: dict[Any, list[str]] = {}
        for owner, name in places:
            names.setdefault(owner, []).append(name)
        module = native.extension()
        self.names = (_Names if module is None else module.NameState)([*names.items()])
        self.replaced = next((_spell(*p) for p in places if not _is_original(*p)), "")

    def same(self) -> bool:
        return self.names.same()


class _Names:
    """The extension's NameState where there is none."""

    def __init__(self, places: list[tuple[Any, list[str]]]) -> None:
        self._places = [(owner, name) for owner, names in places for name in names]
        self._seen = [getattr(owner, name) for owner, name in self._places]

    def same(self) -> bool:
        missing = object()
        return self._seen == [getattr(owner, name, missing) for owner, name in self._places]


_CALLS: dict[Kinds | type[nn.Module], Calls] = {}


def calls(kinds: Kinds) -> Calls:
    """What timm's forward of modules of these classes calls now."""
    found = _CALLS.get(kinds)
    if found is None or not found.same():
        known = frozenset(kind for kind in map(_known, kinds) if kind is not None)
        found = Calls(known)
        if known == kinds:  # a class that was made on the way is not to live on here
            _CALLS[kinds] = found
    return found


@torch.compiler.assume_constant_result
def replaced(kind: type[nn.Module]) -> str:
    """What timm's forward of one class would call that is not torch's or timm's own; "" if none."""
    found = _CALLS.get(kind)
    if found is None or not found.same():
        found = calls(frozenset((kind,)))
        if _known(kind) is kind:
            _CALLS[kind] = found
    return found.replaced


@torch.compiler.assume_constant_result
def is_known(kind: type[nn.Module]) -> bool:
    """Whether a class is one of torch's or timm's, and not made on the way."""
    return _known(kind) is kind


def is_watched() -> bool:
    """Whether a function mode waits for the calls of torch's functions, other than that of
    `torch.device` as a context, which changes none but those that make tensors."""
    return torch._C._len_torch_function_stack() > 0 and any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    )


def _known(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class itself, or that of torch or timm which one that was made on the way derives from;
    None for what others wrote, whose forward is their own."""
    for base in kind.__mro__:
        if getattr(sys.modules.get(base.__module__), base.__name__, None) is base:
            ours = _home(base.__module__) in _HOMES and issubclass(base, nn.Module)
            return base if ours and not issubclass(base, torch.jit.ScriptModule) else None
    return None


def _places(kind: type[nn.Module]) -> Iterator[Place]:
    """Where what the forward of a class calls is found: timm's forward, of a drop-in."""
    yield kind, "forward"
    yield from ((kind, name) for name in _ACCESS)
    kind = getattr(kind, "timm_class", kind)
    yield kind, "forward"
    waiting, known = [kind.forward], set()
    while waiting:
        function = waiting.pop()
        if not isinstance(function, FunctionType) or function in known:
            continue
        known.add(function)
        for owner, name in _called(function, kind):
            yield owner, name
            if owner is not functional:
                waiting.append(getattr(owner, name))


def _called(function: FunctionType, kind: type[nn.Module]) -> Iterator[Place]:
    """What the code of a function of timm's, or of a method of torch's, names."""
    home, names = function.__globals__["__name__"], function.__code__.co_names
    if _home(home) not in ("torch", "timm"):
        return
    module = sys.modules[home]
    for name in names:
        value = getattr(module, name, None)
        if name in ("F", "functional"):  # Swin spells it torch.nn.functional
            if name == "F" and _home(home) == "timm":
                yield module, name
            yield from ((functional, n) for n in names if _is_function(getattr(functional, n, 0)))
        elif _home(home) == "timm" and _is_function(value):
            yield module, name
        elif not hasattr(nn.Module, name) and _is_function(getattr(kind, name, None)):
            yield kind, name


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type)


def _is_original(owner: Any, name: str) -> bool:
    value = getattr(owner, name)
    if name == "F":
        return value is functional
    home = getattr(value, "__globals__", {}).get("__name__", "")
    builtin = isinstance(value, (BuiltinFunctionType, WrapperDescriptorType))
    return builtin or _home(home) in _HOMES


def _home(module: str) -> str:
    return module.partition(".")[0]


def _spell(owner: Any, name: str) -> str:
    if isinstance(owner, ModuleType):
        return f"{owner.__name__}.{name}"
    return f"{_home(owner.__module__)}'s {owner.__name__}.{name}"
