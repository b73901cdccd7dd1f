"""Modules called one after the other, each of which alone reads what the one before made."""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import nn

from vitfast.engine import donation
from vitfast.engine.eligibility import CALLERS, has_hooks
from vitfast.runtime import native
from vitfast.runtime.watched import PLAIN
from vitfast.settings import settings

_REPLACED = ("forward", *CALLERS)


def is_worthwhile(x: object) -> bool:
    """Whether modules that get x are to be called by `in_turn`: in inference on the CPU, a large
    tensor, or with `settings.memory = "low"` any."""
    if torch.compiler.is_compiling() or type(x) not in PLAIN or torch.is_grad_enabled():
        return False
    assert isinstance(x, torch.Tensor)
    return x.is_cpu and (settings.memory == "low" or x.numel() * x.itemsize >= native.LARGE)


def is_seen(module: nn.Module) -> bool:
    """Whether something besides the module gets hold of its input or result: a hook, or a forward
    or call that was replaced."""
    state = module.__dict__
    return has_hooks(module) or any(state.get(name) is not None for name in _REPLACED)


def in_turn(
    modules: Iterable[nn.Module], x: torch.Tensor, ours: Container[type[nn.Module]]
) -> torch.Tensor:
    """modules[-1](... modules[0](x)): what an `nn.Sequential` of them computes, bit for bit.

    What a drop-in made is given to the next, which may write its result there. So is x if it was
    given to this call. What another module got or made may be kept by it, and what something else
    sees (a hook, say) by that: it is written to by nobody, and they get nothing to write to.

    Args:
        ours: the classes of drop-ins, which keep nothing; not what derives from them.
    """
    outer = donation.given()
    mine = donation.is_given(x)
    try:
        for module in modules:
            kind, seen = type(module), is_seen(module)
            is_ours = kind in ours and not seen
            donation.give(x.data_ptr() if mine and is_ours else 0)
            y = module(x)
            if is_ours:
                mine = type(y) is torch.Tensor and donation.is_made(y)
            else:
                mine = mine and kind is nn.Identity and not seen
            x = y
    finally:
        donation.give_back(outer, mine)
    return x
