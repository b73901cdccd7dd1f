"""Global response norm of ConvNeXt V2, forward and backward."""

from vitfast.ops.grn.api import grn

__all__ = ["grn"]
