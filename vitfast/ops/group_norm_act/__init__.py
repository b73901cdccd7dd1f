"""GroupNorm with a residual and an activation."""

from vitfast.ops.group_norm_act.api import group_norm_act

__all__ = ["group_norm_act"]
