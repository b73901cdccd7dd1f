"""Norm and residual connection on the kernels of csrc/cpu/norm.h."""

from __future__ import annotations

from functools import partial

from vitfast.ops.common import norm as norm_op
from vitfast.ops.norm_add import kernels
from vitfast.ops.norm_add.reference import Call
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend


def can_run(call: Call) -> list[str]:
    return norm_op.reasons(call.x, call.branch, call.weight, call.bias, out_dtype=call.dtype)


BACKEND = Backend(
    "cpu",
    partial(kernels.forward, norm_op.NATIVE),
    can_run,
    partial(kernels.backward, norm_op.NATIVE),
    native.reasons,
)
