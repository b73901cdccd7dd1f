"""RMSNorm over the last dimension."""

from vitfast.ops.rms_norm.api import rms_norm

__all__ = ["rms_norm"]
