"""Steps of the CPU's inference that work row by row, and how many rows go through at a time.

Nothing here checks what it is given: see `_fits`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from vitfast.layers._norm import Norm
from vitfast.ops import _gemm, _onednn
from vitfast.ops import _norm as norm_op

if TYPE_CHECKING:
    from vitfast.layers._guard import Linear
    from vitfast.layers._mlp import Mlp

CHUNK_ROWS = 1024
WHOLE_ROWS = 2048
"""Up to so many rows go through as one chunk."""


def add(
    x: torch.Tensor, branch: torch.Tensor, gamma: torch.Tensor | None, out: torch.Tensor
) -> None:
    norm_op.forward(norm_op.NONE, x, branch=branch, gamma=gamma, residual_out=out)


def add_normed(x: torch.Tensor, branch: torch.Tensor, norm: Norm, out: torch.Tensor) -> None:
    norm_op.forward(
        norm_op.KINDS[norm.kind],
        branch,
        weight=norm.weight,
        bias=norm.bias,
        eps=norm.eps,
        base=x,
        normed_out=out,
    )


def mlp(
    plan: Mlp, rows: int, dtype: torch.dtype
) -> tuple[
    Callable[[torch.Tensor], list[torch.Tensor]], Callable[[list[torch.Tensor]], torch.Tensor]
]:
    """The two halves of an MLP: to its hidden tensor, in pieces of columns, and from there."""
    plain = plan.packed is None and plan.gate is None and plan.norm is None
    if (
        plain
        and _is_for_onednn(plan.fc1, rows, dtype, plan.act)
        and not _onednn.reasons(*plan.fc2, dtype, "none")
    ):
        both = _onednn.prepare_mlp(*plan.fc1, *plan.fc2, rows, dtype, plan.act)
        return both.hidden, both
    fc1 = linear(plan.fc1, rows, dtype, plan.act, plan.packed, plan.gate)
    fc2 = linear(plan.fc2, rows, dtype)
    return lambda x: [fc1(x)], lambda hidden: fc2(hidden[0])


def linear(
    layer: Linear,
    rows: int,
    dtype: torch.dtype,
    act: str = "none",
    packed: str | None = None,
    gate: Linear | None = None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The faster of oneDNN and our own kernel, which has every activation and gate."""
    plain = packed is None and gate is None
    if plain and _is_for_onednn(layer, rows, dtype, act):
        return _onednn.prepare(*layer, rows, dtype, act)
    gate_weight, gate_bias = gate or (None, None)
    prepared = _gemm.prepare(
        *layer, rows, dtype, gate=packed, gate_weight=gate_weight, gate_bias=gate_bias, keep=True
    )
    return partial(_gemm.apply, prepared, act=act)


def _is_for_onednn(layer: Linear, rows: int, dtype: torch.dtype, act: str) -> bool:
    """Whether oneDNN runs this layer, and no slower than our own kernel."""
    faster = _gemm.is_faster(rows, layer.weight, dtype)
    return not faster and not _onednn.reasons(*layer, dtype, act)


def patches(layer: Linear, rows: int, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """A convolution [N, C, H, W] of disjoint patches, whose rows come as [H, W, C]."""
    weight, bias = layer
    if not _onednn.reasons(weight, bias, dtype, "none"):
        return _onednn.prepare(weight, bias, rows, dtype, channels_last=True)
    return linear(layer._replace(weight=weight.permute(0, 2, 3, 1).flatten(1)), rows, dtype)


def normalise(x: torch.Tensor, norm: Norm, out: torch.Tensor) -> torch.Tensor:
    norm_op.forward(
        norm_op.KINDS[norm.kind],
        x,
        weight=norm.weight,
        bias=norm.bias,
        eps=norm.eps,
        normed_out=out,
    )
    return out


def chunks(rows: int) -> list[slice]:
    """Consecutive row ranges, the first the largest."""
    if rows <= WHOLE_ROWS:
        return [slice(0, rows)]
    return [slice(i, min(i + CHUNK_ROWS, rows)) for i in range(0, rows, CHUNK_ROWS)]
