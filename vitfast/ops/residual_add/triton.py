"""The residual connection on the kernels of vitfast/ops/_norm_triton.py."""

from __future__ import annotations

from vitfast.ops import _norm, _norm_triton
from vitfast.runtime.tuning import Arch, Variant


def forward(x, branch, gamma, drop_scale):
    residual, _, _ = _norm_triton.forward(
        _norm.NONE, x, branch=branch, gamma=gamma, drop_scale=drop_scale
    )
    return residual


def backward(grad, branch, gamma, drop_scale, branch_dtype):
    _, dbranch, dgamma, _, _ = _norm_triton.backward(
        _norm.NONE, None, grad, None, grad_residual=grad, branch=branch, gamma=gamma,
        drop_scale=drop_scale, x_wanted=False, branch_dtype=branch_dtype,
    )  # fmt: skip
    return dbranch, dgamma


def variants(arch: Arch) -> list[Variant]:
    present = {
        "forward": {"x", "branch", "gamma", "drop", "residual"},
        "backward": {"grad_residual", "branch", "gamma", "drop", "dbranch", "dgamma"},
    }
    return _norm_triton.variants(arch, _norm.NONE, present)
