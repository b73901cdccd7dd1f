"""The residual connection and the norm that follows it, in one pass."""

from vitfast.ops.add_norm.api import add_norm

__all__ = ["add_norm"]
