"""Multi-head attention within the windows of a feature map, shifted or not."""

from vitfast.ops.window_attention.api import window_attention

__all__ = ["window_attention"]
