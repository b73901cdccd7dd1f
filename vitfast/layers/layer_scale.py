"""Drop-in for timm's LayerScale, and how the blocks read it."""

from __future__ import annotations

import torch
from timm import layers as timm_layers
from torch import nn

from vitfast.layers import _guard
from vitfast.layers._base import Layer
from vitfast.layers._guard import Children
from vitfast.plans import Unfit


class LayerScale(Layer, timm_layers.LayerScale):
    """`timm.layers.LayerScale`; a block folds it into its residual add.

    Called by itself it is the one multiplication that timm runs, so the forward is timm's.
    """


def child(children: Children, name: str, *, nchw: bool = False) -> torch.Tensor | None:
    """gamma [C] of a LayerScale child (LayerScale2d, if `nchw`); None for an nn.Identity."""
    module = children[name]
    _guard.check_bare(module, name)
    if type(module) is nn.Identity:
        return None
    if type(module) not in ((timm_layers.LayerScale2d,) if nchw else KINDS):
        raise Unfit(f"{name} is a {type(module).__name__}, not timm's LayerScale")
    if module.inplace:
        raise Unfit(f"{name} works in place")
    gamma = _guard.tensor(module, "gamma")
    if gamma is None:
        raise Unfit(f"{name} has no gamma")
    return gamma


KINDS = (timm_layers.LayerScale, LayerScale)
