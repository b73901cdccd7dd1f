"""The biases by relative position that Swin V2 computes from coordinates by a small MLP.

Without autograd on the CPU a result is kept, and used while all that it was computed from is the
same, as `ops._onednn` tells it for weights: computing it anew took 5 % of the time of swinv2_tiny.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from vitfast.layers import _guard
from vitfast.ops import _onednn
from vitfast.runtime import native
from vitfast.runtime.library import autocast_dtype

_KEPT: weakref.WeakKeyDictionary[nn.Module, tuple[Any, torch.Tensor]] = weakref.WeakKeyDictionary()


def table(mlp: nn.Module, coordinates: torch.Tensor, heads: int) -> torch.Tensor:
    """16 sigmoid(mlp(coordinates)) as [positions, heads]; coordinates [1, rows, columns, 2]."""
    state = _state(mlp, coordinates)
    kept = _KEPT.get(mlp) if state is not None else None
    if kept is not None and kept[0] == state:
        return kept[1]
    # The module is called, whatever became of it: hooks and replaced layers count.
    found = 16 * torch.sigmoid(mlp(coordinates).view(-1, heads))
    if state is not None:
        _KEPT[mlp] = state, found
    return found


def _state(mlp: nn.Module, coordinates: torch.Tensor) -> Any:
    """What the result depends on; None where it is to be computed every time."""
    if torch.compiler.is_compiling() or not coordinates.is_cpu or native.reasons():
        return None
    try:
        first, last = (_guard.linear(mlp._modules, name) for name in ("0", "2"))
        plain = _guard.activation(mlp._modules, "1") == "relu" and len(mlp._modules) == 3
        _guard.check_bare(mlp, "cpb_mlp")
    except (KeyError, _guard.Unfit):
        return None
    tensors = [t for t in (coordinates.view(-1, 2), *first, *last) if t is not None]
    if not plain or type(mlp) is not nn.Sequential or _guard.records_grad(*tensors):
        return None
    if any(t.dtype == torch.float64 for t in tensors):
        return None
    return autocast_dtype(coordinates.device), [_onednn.state(torch.atleast_2d(t)) for t in tensors]
