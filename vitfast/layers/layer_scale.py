"""Drop-in for timm's LayerScale."""

from __future__ import annotations

from timm import layers as timm_layers

from vitfast.layers.base import Layer


class LayerScale(Layer, timm_layers.LayerScale):
    """`timm.layers.LayerScale`; a block folds it into its residual add.

    Called by itself it is the one multiplication that timm runs, so the forward is timm's.
    """
