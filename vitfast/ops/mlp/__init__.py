"""Two linear layers with an activation between them, saving one hidden tensor for training."""

from vitfast.ops.mlp.api import mlp

__all__ = ["mlp"]
