"""The residual connection on the kernels of vitfast/ops/common/norm_triton_kernels.py."""

from __future__ import annotations

from functools import partial

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common import norm_triton
from vitfast.ops.residual_add import kernels
from vitfast.runtime.launches import Arch, Variant

forward = partial(kernels.forward, norm_triton.KERNELS)
backward = partial(kernels.backward, norm_triton.KERNELS)


def variants(arch: Arch) -> list[Variant]:
    present = {
        "forward": {"x", "branch", "gamma", "drop", "residual"},
        "backward": {"grad_residual", "branch", "gamma", "drop", "dbranch", "dgamma"},
    }
    return norm_triton.variants(arch, norm_op.NONE, present)
