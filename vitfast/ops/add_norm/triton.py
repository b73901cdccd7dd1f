"""Residual connection and norm on the kernels of vitfast/ops/common/norm_triton_kernels.py."""

from __future__ import annotations

from functools import partial

from vitfast.ops.add_norm import kernels
from vitfast.ops.common import norm as norm_op
from vitfast.ops.common import norm_triton
from vitfast.runtime.launches import Arch, Variant

forward = partial(kernels.forward, norm_triton.KERNELS)
backward = partial(kernels.backward, norm_triton.KERNELS)


def variants(arch: Arch) -> list[Variant]:
    """With LayerScale and DropPath: what holds the most registers."""
    forward = {"x", "branch", "gamma", "drop", "weight", "bias", "residual", "normed", "stats"}
    backward = {
        "grad", "grad_residual", "residual", "branch", "gamma", "drop", "weight", "stats", "dx",
        "dbranch", "dgamma", "dweight", "dbias",
    }  # fmt: skip
    return norm_triton.variants(arch, norm_op.LAYER, {"forward": forward, "backward": backward})
