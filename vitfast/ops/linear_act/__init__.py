"""Linear layer with its activation, plain or gated."""

from vitfast.ops.linear_act.api import linear_act

__all__ = ["linear_act"]
