"""The residual connection to a norm of the branch, in one pass."""

from vitfast.ops.norm_add.api import norm_add

__all__ = ["norm_add"]
