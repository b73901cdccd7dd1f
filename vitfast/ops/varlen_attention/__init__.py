"""Multi-head attention within the sequences of a packed batch, of any lengths."""

from vitfast.ops.varlen_attention.api import varlen_attention

__all__ = ["varlen_attention"]
