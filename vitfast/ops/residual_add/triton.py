"""The residual connection on the kernels of vitfast/ops/common/norm_triton_kernels.py."""

from __future__ import annotations

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common import norm_triton
from vitfast.runtime.launches import Arch, Variant


def forward(x, branch, gamma, drop_scale):
    residual, _, _ = norm_triton.forward(
        norm_op.NONE, x, branch=branch, gamma=gamma, drop_scale=drop_scale
    )
    return residual


def backward(grad, branch, gamma, drop_scale, branch_dtype):
    _, dbranch, dgamma, _, _ = norm_triton.backward(
        norm_op.NONE, None, grad, None, grad_residual=grad, branch=branch, gamma=gamma,
        drop_scale=drop_scale, x_wanted=False, branch_dtype=branch_dtype,
    )  # fmt: skip
    return dbranch, dgamma


def variants(arch: Arch) -> list[Variant]:
    present = {
        "forward": {"x", "branch", "gamma", "drop", "residual"},
        "backward": {"grad_residual", "branch", "gamma", "drop", "dbranch", "dgamma"},
    }
    return norm_triton.variants(arch, norm_op.NONE, present)
