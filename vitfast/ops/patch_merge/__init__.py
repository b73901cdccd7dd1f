"""2x2 neighbours of a feature map side by side, and their norm, in one pass."""

from vitfast.ops.patch_merge.api import patch_merge

__all__ = ["patch_merge"]
