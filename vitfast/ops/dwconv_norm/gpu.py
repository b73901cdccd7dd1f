"""What the backends for GPUs share: operands as their kernels take them, and gradients as asked."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.dwconv_norm.reference import BackwardCall, Call


def taps_of(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[C, 1, k, k'] to [k k', C], rounded to the operands' dtype."""
    return weight.to(dtype).flatten(1).t().contiguous()


def bias_of(call: Call | BackwardCall) -> torch.Tensor | None:
    """The convolution's bias, rounded to the operands' dtype and contiguous."""
    return None if call.bias is None else norm_op.vector(call.bias.to(call.dtype))


def of_wanted(call: BackwardCall, found: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
    """The gradients in their inputs' dtypes, with an empty tensor for those that are not wanted."""
    empty = call.grad.new_empty(0)
    return tuple(
        t.to(of.dtype) if w and t is not None and of is not None else empty
        for t, of, w in zip(found, call.inputs, call.wanted, strict=True)
    )
