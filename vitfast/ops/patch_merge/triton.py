"""Gathering patches and their norm on the kernels of vitfast/ops/common/norm_triton_kernels.py."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common import norm_triton
from vitfast.ops.patch_merge import kernels
from vitfast.runtime.launches import Arch, Variant

forward = partial(kernels.forward, norm_triton.KERNELS)
backward = partial(kernels.backward, norm_triton.KERNELS)
_WIDTHS = (384, 1024, 3072)
"""Four times the width of a stage of Swin: its narrowest, a common one, its widest."""


def variants(arch: Arch) -> list[Variant]:
    normed = {
        "forward": {"x", "weight", "bias", "normed", "stats"},
        "backward": {"grad", "residual", "weight", "stats", "dx", "dweight", "dbias"},
    }
    gathered = {"forward": {"x", "residual"}, "backward": {"grad_residual", "dx"}}
    return [
        *norm_triton.variants(arch, norm_op.LAYER, normed, _WIDTHS, merge=True),
        *(
            replace(v, name=f"gather-{v.name}")
            for v in norm_triton.variants(arch, norm_op.NONE, gathered, _WIDTHS, merge=True)
        ),
    ]
