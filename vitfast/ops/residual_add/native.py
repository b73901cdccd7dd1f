"""The residual connection on the kernels of csrc/cpu/norm.h."""

from __future__ import annotations

from vitfast.ops.common import norm as norm_op
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend


def can_run(x, branch, gamma, drop_scale):
    return norm_op.reasons(x, branch, gamma)


def forward(x, branch, gamma, drop_scale):
    return norm_op.forward(norm_op.NONE, x, branch=branch, gamma=gamma, drop_scale=drop_scale)[0]


def backward(grad, branch, gamma, drop_scale, branch_dtype):
    _, dbranch, dgamma, _, _ = norm_op.backward(
        norm_op.NONE,
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
