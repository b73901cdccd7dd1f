"""Steps of the CPU's inference that work row by row, and how many rows go through at a time.

Nothing here checks what it is given: see `_fits`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from vitfast.ops import _onednn
from vitfast.ops.common import gemm
from vitfast.ops.common import norm as norm_op
from vitfast.plans import Linear, Mlp, Norm

if TYPE_CHECKING:
    pass
    pass

CHUNK_ROWS = 1024
WHOLE_ROWS = 2048
"""Up to so many rows go through as one chunk."""


def count(x: torch.Tensor) -> int:
    """Rows of x [..., C]."""
    return x.numel() // max(x.shape[-1], 1)


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


class Layer(NamedTuple):
    """A linear layer ready to run. own: on our own kernel, which can add as it writes."""

    run: Callable[[torch.Tensor], torch.Tensor]
    own: gemm.Linear | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)

    def into(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """self(x) into `out`."""
        if self.own is None:
            out.copy_(self.run(x))
        else:
            gemm.apply(self.own, x, out=out)

    def add_to(
        self, residual: torch.Tensor, gamma: torch.Tensor | None, x: torch.Tensor, out: torch.Tensor
    ) -> None:
        """residual + gamma * self(x) into `out`, which may be the residual."""
        if self.own is None:
            add(residual, self.run(x), gamma, out)
        else:
            gemm.apply(self.own, x, residual=residual, gamma=gamma, out=out)


class Halves(NamedTuple):
    """An MLP ready to run: to its hidden tensor, in pieces of columns, and from there.

    fc2: the second half where the hidden tensor is one piece.
    """

    hidden: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    output: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    fc2: Layer | None

    def __call__(self, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.output(hidden)

    def add_to(
        self,
        residual: torch.Tensor,
        gamma: torch.Tensor | None,
        hidden: Sequence[torch.Tensor],
        out: torch.Tensor,
    ) -> None:
        """residual + gamma * self(hidden) into `out`, which may be the residual."""
        if self.fc2 is None:
            add(residual, self(hidden), gamma, out)
        else:
            self.fc2.add_to(residual, gamma, hidden[0], out)


def mlp(plan: Mlp, rows: int, dtype: torch.dtype) -> Halves:
    """An MLP for so many rows in all, of this dtype."""
    plain = plan.packed is None and plan.gate is None and plan.norm is None
    if (
        plain
        and _is_for_onednn(plan.fc1, rows, dtype, plan.act)
        and not _onednn.reasons(*plan.fc2, dtype, "none")
    ):
        both = _onednn.prepare_mlp(*plan.fc1, *plan.fc2, rows, dtype, plan.act)
        return Halves(both.hidden, both, None)
    fc1 = linear(plan.fc1, rows, dtype, plan.act, plan.packed, plan.gate)
    fc2 = linear(plan.fc2, rows, dtype)
    return Halves(lambda x: [fc1(x)], lambda hidden: fc2(hidden[0]), fc2)


def linear(
    layer: Linear,
    rows: int,
    dtype: torch.dtype,
    act: str = "none",
    packed: str | None = None,
    gate: Linear | None = None,
    channels_last: bool = False,
) -> Layer:
    """The faster of oneDNN and our own kernel, which has every activation and gate.

    Args:
        channels_last: the weight is [N, C, H, W], of rows [H, W, C].
    """
    plain = packed is None and gate is None
    if plain and _is_for_onednn(layer, rows, dtype, act):
        return Layer(_onednn.prepare(*layer, rows, dtype, act, channels_last), None)
    gate_weight, gate_bias = gate or (None, None)
    prepared = gemm.prepare(
        *layer,
        rows,
        dtype,
        gate=packed,
        gate_weight=gate_weight,
        gate_bias=gate_bias,
        keep=True,
        channels_last=channels_last,
    )
    adds = prepared.matrix is not None and act == "none"
    return Layer(partial(gemm.apply, prepared, act=act), prepared if adds else None)


def _is_for_onednn(layer: Linear, rows: int, dtype: torch.dtype, act: str) -> bool:
    """Whether oneDNN runs this layer, and no slower than our own kernel."""
    faster = gemm.is_faster(rows, layer.weight, dtype)
    return not faster and not _onednn.reasons(*layer, dtype, act)


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


def in_chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same consecutive rows of each, all or CHUNK_ROWS at a time."""
    rows = tensors[0].shape[0]
    step = rows if rows <= WHOLE_ROWS else CHUNK_ROWS
    for i in range(0, rows, max(step, 1)):
        chunk = slice(i, min(i + step, rows))
        yield tuple(part(t, chunk) for t in tensors)


def part(t: torch.Tensor, rows: slice) -> torch.Tensor:
    """t[rows]; a view costs more than a comparison."""
    return t if rows.start == 0 and rows.stop == t.shape[0] else t[rows]
