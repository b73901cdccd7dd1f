"""Gathering patches and their norm on the kernels of csrc/cpu/norm.h."""

from __future__ import annotations

from functools import partial

from vitfast.ops.common import norm as norm_op
from vitfast.ops.patch_merge import kernels
from vitfast.ops.patch_merge.reference import Call
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend


def can_run(call: Call) -> list[str]:
    return norm_op.reasons(call.x, call.weight, call.bias, out_dtype=call.out_dtype)


BACKEND = Backend(
    "cpu",
    partial(kernels.forward, norm_op.NATIVE),
    can_run,
    partial(kernels.backward, norm_op.NATIVE),
    native.reasons,
)
