"""Whether a model is what its graphs were captured of: same modules, attributes and memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitfast.engine import originals
from vitfast.engine.eligibility import PLAIN
from vitfast.runtime import native

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def reason_against(module: nn.Module, device: torch.device) -> str:
    """Why a model as it is cannot be replayed on a device; "" where it can."""
    for name, child in module.named_modules():
        what = name or "the model"
        if child.training and _heeds_training(type(child)):
            return f"{what} is in training mode"
        # The model's own run around what is replayed, as ever.
        if child is not module and any(child.__dict__.get(kind) for kind in _HOOKS):
            return f"{what} has a forward hook, which a replay would not call"
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        if type(t) not in (*PLAIN, nn.Buffer):
            return f"{name} is a {type(t).__name__}"
        if t.device != device:
            return f"{name} is on {t.device}, the inputs are on {device}"
    return ""


def _heeds_training(kind: type[nn.Module]) -> bool:
    """Whether a forward may ask if its module is in training mode; no for plain ones of torch, such
    as a new head in a model that is in evaluation mode."""
    code = getattr(kind.forward, "__code__", None)
    if code is None or not kind.__module__.startswith("torch.nn.modules."):
        return True
    return "training" in code.co_names


class Guard:
    """A model as it is now. It keeps the model's tensors alive, not the model.

    Values of weights may change in place, as by an optimizer or `load_state_dict`: a graph reads
    them where they lie. What is in lists or objects among a module's attributes is not looked at.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        found = (t for m in modules for t in (*m._parameters.values(), *m._buffers.values()))
        self._tensors = list({id(t): t for t in found if t is not None}.values())
        self._addresses = self._addresses_now()
        self._strides = self._strides_now()
        names = originals.calls(frozenset(map(type, modules))).names
        extension = native.extension()
        state = _ModuleState if extension is None else extension.ModuleState
        self._state = state(modules, names)

    def _addresses_now(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, self._tensors))

    def _strides_now(self) -> list[tuple[int, ...]]:
        return list(map(torch.Tensor.stride, self._tensors))

    def is_in_place(self) -> bool:
        """Whether all memory that graphs read is still that of the tensors it was: they may run."""
        return self._addresses_now() == self._addresses

    def is_same(self, module: nn.Module) -> bool:
        """Whether nothing about the model has changed: what a graph computes is right."""
        same: bool = self._state.same(module)
        return same and self.is_in_place() and self._strides_now() == self._strides

    def requires_grad(self) -> bool:
        return any(t.requires_grad for t in self._tensors)


class _ModuleState:
    """The extension's ModuleState where there is none: classes of modules, and the identities of
    what is in their dictionaries and in the dictionaries in those."""

    _IGNORED = ("_vitfast_memos", "_state_dict_hooks", "_load_state_dict_pre_hooks")

    def __init__(self, modules: list[nn.Module], names: Any) -> None:
        self._modules, self._names = [(type(m), self._held(m)) for m in modules], names

    def _held(self, module: nn.Module) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = []
        for name, value in module.__dict__.items():
            if name in self._IGNORED:
                continue
            if isinstance(value, dict):
                found.append((name, len(value)))
                found.extend((f"{name}.{key}", inner) for key, inner in value.items())
            else:
                found.append((name, value))
        # A child would keep its parent's parts alive for each other; its class is looked at anyway.
        return [(n, id(v) if isinstance(v, nn.Module) else v) for n, v in found]

    def same(self, module: nn.Module) -> bool:
        modules = list(module.modules())
        if len(modules) != len(self._modules) or not self._names.same():
            return False
        for child, (kind, held) in zip(modules, self._modules, strict=True):
            now = self._held(child)
            if type(child) is not kind or len(now) != len(held):
                return False
            for (name, value), (known, seen) in zip(now, held, strict=True):
                if name != known or (value is not seen and not _equal(value, seen)):
                    return False
        return True


def _equal(value: Any, seen: Any) -> bool:
    """Of numbers, which may be equal without being one object."""
    return type(value) is type(seen) and isinstance(value, (int, float, str)) and value == seen
