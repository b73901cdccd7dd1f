"""vitfast: fused kernels for timm's vision transformers, weights and outputs unchanged.

    import timm, vitfast
    model = timm.create_model("vit_base_patch16_224", pretrained=True).eval()
    print(vitfast.swap(model))

Importing this package imports neither torch nor timm; attributes load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitfast import highres, layers, ops
    from vitfast.embedding import Embedder
    from vitfast.graphs import graphed, ungraphed
    from vitfast.preparation import TrustReport, prepare
    from vitfast.settings import settings
    from vitfast.swap import SwapReport, create_model, refresh, restore, swap

__version__ = "0.1.0"

__all__ = [
    "Embedder",
    "SwapReport",
    "TrustReport",
    "__version__",
    "create_model",
    "graphed",
    "highres",
    "layers",
    "ops",
    "prepare",
    "refresh",
    "restore",
    "settings",
    "swap",
    "ungraphed",
]

_HOME = {
    "Embedder": "vitfast.embedding",
    "SwapReport": "vitfast.swap",
    "TrustReport": "vitfast.preparation",
    "create_model": "vitfast.swap",
    "graphed": "vitfast.graphs",
    "prepare": "vitfast.preparation",
    "refresh": "vitfast.swap",
    "restore": "vitfast.swap",
    "settings": "vitfast.settings",
    "swap": "vitfast.swap",
    "ungraphed": "vitfast.graphs",
}


def __getattr__(name: str) -> Any:
    if name in ("highres", "layers", "ops"):
        return importlib.import_module(f"vitfast.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
