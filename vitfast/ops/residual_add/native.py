"""The residual connection on the kernels of csrc/cpu/norm.h."""

from __future__ import annotations

from vitfast.ops import _norm
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend


def can_run(x, branch, gamma, drop_scale):
    return _norm.reasons(x, branch, gamma)


def forward(x, branch, gamma, drop_scale):
    return _norm.forward(_norm.NONE, x, branch=branch, gamma=gamma, drop_scale=drop_scale)[0]


def backward(grad, branch, gamma, drop_scale, branch_dtype):
    _, dbranch, dgamma, _, _ = _norm.backward(
        _norm.NONE,
        None,
        grad,
        None,
        grad_residual=grad,
        branch=branch,
        gamma=gamma,
        drop_scale=drop_scale,
        x_wanted=False,
        branch_dtype=branch_dtype,
    )
    return dbranch, dgamma


BACKEND = Backend("cpu", forward, can_run, backward, native.reasons)
