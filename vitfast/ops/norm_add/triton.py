"""Norm and residual connection on the kernels of vitfast/ops/common/norm_triton_kernels.py."""

from __future__ import annotations

from functools import partial

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common import norm_triton
from vitfast.ops.norm_add import kernels
from vitfast.runtime.launches import Arch, Variant

forward = partial(kernels.forward, norm_triton.KERNELS)
backward = partial(kernels.backward, norm_triton.KERNELS)
_WIDTHS = (96, 384, 1536)
"""Of Swin V2: its narrowest, its commonest, its widest."""


def variants(arch: Arch) -> list[Variant]:
    """With DropPath: what holds the most registers."""
    present = {
        "forward": {"x", "weight", "bias", "base", "scale", "normed", "stats"},
        "backward": {"grad", "residual", "weight", "scale", "stats", "dx", "dweight", "dbias"},
    }
    return norm_triton.variants(arch, norm_op.LAYER, present, _WIDTHS)
