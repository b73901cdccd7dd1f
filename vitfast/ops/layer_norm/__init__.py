"""LayerNorm over the last dimension."""

from vitfast.ops.layer_norm.api import layer_norm

__all__ = ["layer_norm"]
