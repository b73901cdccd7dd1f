"""Whether a timm module still holds what its constructor gave it, beyond its weights.

timm's forwards read more than weights: the scale of an attention, the axis of a norm, the index of
a position bias, the mask of shifted windows. The fused forwards know what these are from a layer's
sizes and do not read them, so they are right only as long as nobody gave them other values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vitfast.plans import Unfit

_Evidence = tuple[torch.Tensor, int, tuple]  # a buffer, its version and what it was compared for
_SEEN: weakref.WeakKeyDictionary[nn.Module, dict[str, _Evidence]] = weakref.WeakKeyDictionary()


def expect_attributes(module: nn.Module, **values: Any) -> None:
    """That attributes have these values, where the module has them in this version of timm."""
    for name, value in values.items():
        found = getattr(module, name, value)
        if found != value:
            raise Unfit(f"{name} of {type(module).__name__} is {found}, not {value}")


def expect_buffer(
    module: nn.Module, name: str, make: Callable[[torch.Tensor], torch.Tensor | None], *key: object
) -> None:
    """That a buffer holds exactly make(the buffer), which depends on `key` besides.

    It is compared anew only when the buffer or the key is another or something wrote to the buffer.
    Not while torch compiles, whose graphs cannot depend on values, nor on the meta device.
    """
    if torch.compiler.is_compiling():
        return
    found = module._buffers.get(name)
    if found is None:
        if make(torch.empty(0, device="cpu")) is not None:
            raise Unfit(f"{name} of {type(module).__name__} is missing")
        return
    if type(found) is not torch.Tensor:
        raise Unfit(f"{name} of {type(module).__name__} is not a plain tensor")
    version = -1 if found.is_inference() else found._version
    seen = _SEEN.setdefault(module, {})
    known = seen.get(name)
    if known is not None and known[0] is found and known[1:] == (version, key) and version >= 0:
        return
    if not found.is_meta:
        expected = make(found)
        if (
            expected is None
            or found.shape != expected.shape
            or not torch.equal(found, expected.to(found.device, found.dtype))
        ):
            raise Unfit(f"{name} of {type(module).__name__} holds other values than timm gives it")
    seen[name] = found, version, key
