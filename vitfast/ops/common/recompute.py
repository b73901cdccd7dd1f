"""Recompute a normalised operand in the backward instead of saving it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vitfast.errors import InputValueError
from vitfast.ops.common import norm as norm_op
from vitfast.ops.layer_norm import api as layer_norm
from vitfast.ops.rms_norm import api as rms_norm
from vitfast.runtime import checks


class Normed(NamedTuple):
    """How an operand was made: the norm of `source` over its last dimension."""

    source: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    kind: str


SCHEMA = "Tensor? source, Tensor? norm_weight, Tensor? norm_bias, float eps, str kind"


def check(op: str, x: torch.Tensor, normed: Normed | None) -> None:
    if normed is None:
        return
    checks.check_shape(op, "normed.source", normed.source, tuple(x.shape))
    if normed.kind not in norm_op.KINDS:
        raise InputValueError(f"{op}: normed.kind must be 'layer' or 'rms', got {normed.kind!r}")


def kept(
    x: torch.Tensor, source: torch.Tensor | None, weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """What to save so that `again` can give x."""
    return (x, None, None) if source is None else (source, weight, bias)


def again(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, kind: str,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """The operand from what `kept` saved."""
    if not kind:
        return x
    if kind == "rms":
        rms_call = rms_norm.Call(x, weight, eps, dtype, False)
        return rms_norm.DISPATCHER.pick("auto", rms_call).forward(rms_call)[0]
    call = layer_norm.Call(x, weight, bias, eps, dtype, False)
    return layer_norm.DISPATCHER.pick("auto", call).forward(call)[0]
