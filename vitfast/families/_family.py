"""What a family file says: its layers, and the classes that are left to timm."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from torch import nn

from vitfast.layers import Layer


@dataclass(frozen=True)
class Gap:
    """A timm class that is known and left alone.

    Args:
        path: where timm defines it, e.g. "timm.models.eva.EvaBlockPostNorm".
        reason: why, as the report prints it.
        role: "block" or "attention" where a strict swap has to refuse; "part" for the rest.
    """

    path: str
    reason: str
    role: str = "part"

    def resolve(self) -> type[nn.Module] | None:
        """The class, or None where the installed timm has none of this name."""
        module, _, name = self.path.rpartition(".")
        try:
            return getattr(importlib.import_module(module), name, None)
        except ImportError:
            return None


@dataclass(frozen=True)
class Family:
    """One family of models.

    Args:
        name: as in reports and docs.
        models: the files of `timm.models` that define its models, e.g. "vision_transformer".
        sample: a registered model that stands for the family.
        layers: drop-in layers that this family adds; each knows its timm class.
        gaps: classes of this family that are left to timm.
    """

    name: str
    models: tuple[str, ...]
    sample: str
    layers: tuple[type[Layer], ...] = ()
    gaps: tuple[Gap, ...] = ()


def blocks(module: str, *names: str, reason: str = "not implemented yet") -> tuple[Gap, ...]:
    """Gaps for the blocks of one timm module, by class name."""
    return tuple(Gap(f"{module}.{name}", reason, "block") for name in names)


def attentions(module: str, *names: str, reason: str = "not implemented yet") -> tuple[Gap, ...]:
    """Gaps for the attention modules of one timm module, by class name."""
    return tuple(Gap(f"{module}.{name}", reason, "attention") for name in names)
