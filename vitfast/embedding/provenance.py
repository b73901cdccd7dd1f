"""What vectors came from: the facts kept beside them, and whether two sets of facts agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch

import vitfast
from vitfast.runtime.commit import commit

FORMAT = 1
MUST_AGREE = (
    "format", "model", "model_kwargs", "weights_sha256", "preprocessing", "pool", "dtype",
    "normalized", "dim",
)  # fmt: skip
"""Vectors that differ in one of these cannot be compared. Versions, the device and whether fused
kernels ran change a vector by rounding only."""


def versions() -> dict[str, str | None]:
    """Of vitfast and the commit it runs from (None where installed), timm and torch."""
    return {
        "vitfast": vitfast.__version__,
        "commit": commit(),
        "timm": timm.__version__,
        "torch": torch.__version__,
    }


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The first of the facts that have to agree and do not, in words; "" if all agree."""
    for key in MUST_AGREE:
        a, b = there.get(key), here.get(key)
        if a != b:
            if key == "weights_sha256":
                a, b = str(a)[:12], str(b)[:12]
            return f"{key} is {a!r} there and {b!r} here"
    return ""
