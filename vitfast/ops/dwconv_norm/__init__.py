"""Depthwise convolution of a feature map, and a norm over its channels, in one pass."""

from vitfast.ops.dwconv_norm.api import dwconv_norm

__all__ = ["dwconv_norm"]
