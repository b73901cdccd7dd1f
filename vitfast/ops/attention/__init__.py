"""Multi-head attention with q/k norm, rotary embedding, mask and bias."""

from vitfast.ops.attention.api import attention

__all__ = ["attention"]
