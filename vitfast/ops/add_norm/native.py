"""Residual connection and norm on the kernels of csrc/cpu/norm.h."""

from __future__ import annotations

from functools import partial

from vitfast.ops.add_norm import kernels
from vitfast.ops.add_norm.reference import Call
from vitfast.ops.common import norm as norm_op
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend


def can_run(call: Call) -> list[str]:
    return norm_op.reasons(
        call.x, call.branch, call.weight, call.bias, call.gamma, out_dtype=call.out_dtype
    )


BACKEND = Backend(
    "cpu",
    partial(kernels.forward, norm_op.NATIVE),
    can_run,
    partial(kernels.backward, norm_op.NATIVE),
    native.reasons,
)
