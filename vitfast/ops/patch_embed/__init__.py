"""Image to tokens: normalisation, patches, projection, position embedding, prefix tokens."""

from vitfast.ops.patch_embed.api import patch_embed

__all__ = ["patch_embed"]
