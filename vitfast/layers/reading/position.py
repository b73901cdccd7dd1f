"""The biases by relative position of timm's layers as tables for `ops.window_attention`.

Swin V2 and MaxViT may compute theirs from coordinates by a small MLP. Without autograd on the CPU a
result is kept, and used while all that it was computed from is the same, as `engine.products`
tells it for weights: computing it anew took 5 % of the time of swinv2_tiny. Autograd saves no
inference tensors: a result of `torch.inference_mode` is used only where nothing is recorded.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from timm import layers as timm_layers
from torch import nn

from vitfast.engine.eligibility import records_grad, takes_engine
from vitfast.engine.products import weights as weights_cache
from vitfast.layers.reading.as_built import expect_attributes, expect_buffer
from vitfast.layers.reading.children import (
    check_bare,
    check_readable,
    read_activation,
    read_linear,
    read_parameter,
    timm_class,
)
from vitfast.layers.reading.mlp import MLP_PLANS, check_mlp_read
from vitfast.plans import Linear, Unfit, Unsupported
from vitfast.runtime.library import autocast_dtype

_KEPT: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Any, torch.Tensor]]
_KEPT = weakref.WeakKeyDictionary()
if hasattr(os, "register_at_fork"):  # what tells changes may count on threads that a child lacks
    os.register_at_fork(after_in_child=_KEPT.clear)


def position_index(window: tuple[int, int]) -> torch.Tensor:
    """Which relative position each pair of a window's tokens has, int64 [h w, h w]."""
    return timm_layers.gen_relative_position_index(window)


def check_position_index(module: nn.Module, window: tuple[int, int]) -> None:
    """That a module reads its table as `ops.window_attention` does."""
    expect_buffer(
        module,
        "relative_position_index",
        lambda found: position_index(window).view(found.shape),
        window,
    )


def _check_lookup(module: nn.Module, name: str, length: int) -> None:
    """That timm's `RelPosBiasTf` picks distances along an axis of this length in their order."""

    def one_hot(found: torch.Tensor) -> torch.Tensor:
        places = torch.arange(length, device="cpu")
        distances = places - places[:, None] + length - 1
        return nn.functional.one_hot(distances, 2 * length - 1)

    expect_buffer(module, name, one_hot, length)


def swin_v2_table(mlp: nn.Module, coordinates: torch.Tensor, heads: int) -> torch.Tensor:
    """Swin V2's: 16 sigmoid(mlp(coordinates)) as [positions, heads]."""
    return _kept(
        mlp, coordinates, lambda: 16 * torch.sigmoid(mlp(coordinates).view(-1, heads)), "swin"
    )


def read_relative_bias(module: Any) -> torch.Tensor | None:
    """[positions, heads] of timm's `RelPosBias`, `RelPosBiasTf` or `RelPosMlp`; None for None."""
    if module is None:
        return None
    kind = type(module)
    if kind not in (timm_layers.RelPosBias, timm_layers.RelPosBiasTf, timm_layers.RelPosMlp):
        raise Unsupported(f"position bias {kind.__name__} is not implemented")
    check_bare(module, "rel_pos")
    if getattr(module, "prefix_tokens", 0):
        raise Unsupported("a position bias with prefix tokens is not implemented")
    window = tuple(module.window_size)
    if kind is timm_layers.RelPosMlp:
        heads, area = module.num_heads, window[0] * window[1]
        expect_attributes(module, bias_shape=(area, area, heads))
        check_position_index(module, window)
        return _from_mlp(module)
    found = read_parameter(module, "relative_position_bias_table")
    if found is None:
        raise Unfit("rel_pos has no table")
    if kind is timm_layers.RelPosBias:
        area = window[0] * window[1]
        expect_attributes(module, bias_shape=(area, area, found.shape[1]))
        check_position_index(module, window)
    else:
        _check_lookup(module, "height_lookup", window[0])
        _check_lookup(module, "width_lookup", window[1])
    # [heads, 2 h - 1, 2 w - 1] by how far the key lies from the query, not the query from the key.
    return found if kind is timm_layers.RelPosBias else found.flip(1, 2).flatten(1).t()


def _from_mlp(module: Any) -> torch.Tensor:
    check_bare(module.bias_act, "bias_act")

    def compute() -> torch.Tensor:
        found = module.bias_act(module.mlp(module.rel_coords_log).view(-1, module.num_heads))
        return found if module.bias_gain is None else module.bias_gain * found

    act = type(module.bias_act)
    if act not in (nn.Identity, nn.Sigmoid):
        return compute()
    return _kept(module.mlp, module.rel_coords_log, compute, (act, module.bias_gain))


def forget_tables(mlp: nn.Module) -> None:
    """Keep no table of this MLP's."""
    _KEPT.pop(mlp, None)


def _kept(
    mlp: nn.Module, coordinates: torch.Tensor, compute: Callable[[], torch.Tensor], form: Any
) -> torch.Tensor:
    """compute(), of an MLP of coordinates [..., 2]; `form` is what else it depends on."""
    inputs = _inputs(mlp, coordinates)
    if inputs is None:
        return compute()
    (*how, tensors), kept = inputs, _KEPT.get(mlp)
    if (
        kept is not None
        and kept[0] == (form, *how)
        and not (kept[2].is_inference() and torch.is_grad_enabled())
        and kept[1].same(tensors)
    ):
        return kept[2]
    state = weights_cache.state(tensors)
    # The module is called, whatever became of it: hooks and replaced layers count.
    found = compute()
    _KEPT[mlp] = (form, *how), state, found
    return found


def _inputs(
    mlp: nn.Module, coordinates: torch.Tensor
) -> tuple[str, torch.dtype | None, tuple[torch.Tensor, ...]] | None:
    """What the MLP's result depends on; None where it is to be computed every time."""
    if not takes_engine(coordinates):
        return None
    try:
        check_bare(mlp, "mlp")
        check_readable(coordinates, "coordinates")
        act, linears = _parts(mlp)
    except (KeyError, Unfit):
        return None
    weights = (t for pair in linears for t in pair if t is not None)
    tensors = (coordinates.reshape(-1, 2), *weights)
    if records_grad(tensors) or any(t.dtype == torch.float64 for t in tensors):
        return None
    return act, autocast_dtype(coordinates.device), tensors


def _parts(mlp: nn.Module) -> tuple[str, tuple[Linear, ...]]:
    """Activation and projections of a plain MLP, whose result is known by them."""
    children = mlp._modules
    if type(mlp) is nn.Sequential:
        if len(children) != 3:
            raise Unfit("it is no MLP")
        first, last = (read_linear(children, name) for name in ("0", "2"))
        return read_activation(children, "1"), (first, last)
    plan = MLP_PLANS.get(timm_class(mlp))
    if plan is None:
        raise Unfit("it is no MLP")
    found = check_mlp_read(plan(mlp))
    if found.norm is not None or found.gate is not None or found.packed is not None:
        raise Unfit("it has a norm or a gate")
    return found.act, (found.fc1, found.fc2)
