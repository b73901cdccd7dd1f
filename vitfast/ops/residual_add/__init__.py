"""The residual connection: x + drop_scale * gamma * branch."""

from vitfast.ops.residual_add.api import residual_add

__all__ = ["residual_add"]
