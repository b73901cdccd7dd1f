"""Which timm class becomes which drop-in layer, family by family; what is left to timm, and why.

Adding a family is one file here with a `FAMILY`, and its name in `NAMES`.
"""

from __future__ import annotations

import functools
import importlib

from torch import nn

from vitfast.families._family import Family, Gap
from vitfast.layers import Layer

NAMES = (
    "vit",
    "eva",
    "naflex",
    "beit",
    "relpos",
    "hybrid",
    "convnext",
    "edgenext",
    "rdnet",
    "inception_next",
    "metaformer",
    "swin",
    "swin_v2",
    "swin_v2_cr",
    "davit",
    "maxvit",
    "hiera",
    "other",
)

__all__ = ["NAMES", "Family", "Gap", "families", "gap_table", "layer_table"]


@functools.cache
def families() -> tuple[Family, ...]:
    """Every family, the most general first."""
    return tuple(importlib.import_module(f"vitfast.families.{name}").FAMILY for name in NAMES)


@functools.cache
def layer_table() -> dict[type[nn.Module], type[Layer]]:
    """timm class -> drop-in layer."""
    return {layer.timm_class: layer for family in families() for layer in family.layers}


@functools.cache
def gap_table() -> dict[type[nn.Module], Gap]:
    """timm class -> why it is left alone; classes that the installed timm lacks are left out."""
    return {
        timm_class: gap
        for family in families()
        for gap in family.gaps
        if (timm_class := gap.resolve()) is not None
    }
