"""The MLP of a transformer block in plain PyTorch: the definition."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vitfast.ops.grn.reference import grn as response
from vitfast.ops.linear_act.reference import Call as LinearCall
from vitfast.ops.linear_act.reference import linear_act


class Call(NamedTuple):
    """The arguments of `vitfast::mlp` before `backend`, in the order of its schema.

    Args:
        x, weight1, bias1, weight2, bias2, act: as in `vitfast.ops.mlp`.
        source, norm_weight, norm_bias, eps, kind: what x is the norm of, as in linear_act's `Call`.
        grn_weight, grn_bias, grn_eps: of the global response norm before fc2; None, None and 0
            without one.
        gate: "first" or "last" as in `vitfast.ops.linear_act`; "" for None.
        save: whether what the backward needs is returned too: fc1's result before the activation.
    """

    x: torch.Tensor
    source: torch.Tensor | None
    norm_weight: torch.Tensor | None
    norm_bias: torch.Tensor | None
    eps: float
    kind: str
    weight1: torch.Tensor
    bias1: torch.Tensor | None
    weight2: torch.Tensor
    bias2: torch.Tensor | None
    grn_weight: torch.Tensor | None
    grn_bias: torch.Tensor | None
    act: str
    gate: str
    save: bool
    grn_eps: float

    @property
    def first(self) -> LinearCall:
        """fc1 with its activation, as a call of `linear_act`."""
        return LinearCall.of(
            self.x, self.weight1, self.bias1, self.act, self.gate, save_z=self.save
        )

    def second(self, hidden: torch.Tensor) -> LinearCall:
        """fc2 of a hidden tensor [..., N], as a call of `linear_act`."""
        return LinearCall.of(hidden, self.weight2, self.bias2)


INPUTS = ("x", "weight1", "bias1", "weight2", "bias2", "grn_weight", "grn_bias")
"""Differentiable inputs, in the order of the outputs of `vitfast::mlp_backward`."""


class BackwardCall(NamedTuple):
    """The arguments of `vitfast::mlp_backward` before `backend`, in the order of its schema.

    Args:
        grad: [..., M], the gradient of the result.
        x: as in linear_act's `BackwardCall`.
        z: [..., N or 2N], fc1's result before the activation.
        wanted: whether the gradient is asked for, for each of `INPUTS`.

    The other fields are as in `Call`.
    """

    grad: torch.Tensor
    x: torch.Tensor
    norm_weight: torch.Tensor | None
    norm_bias: torch.Tensor | None
    eps: float
    kind: str
    weight1: torch.Tensor
    bias1: torch.Tensor | None
    weight2: torch.Tensor
    bias2: torch.Tensor | None
    grn_weight: torch.Tensor | None
    grn_bias: torch.Tensor | None
    z: torch.Tensor
    act: str
    gate: str
    grn_eps: float
    wanted: list[bool]

    @property
    def forward_call(self) -> Call:
        """The call that this is the backward of, without what x is the norm of."""
        return Call(
            self.x, None, None, None, 1e-6, "", self.weight1, self.bias1, self.weight2, self.bias2,
            self.grn_weight, self.grn_bias, self.act, self.gate, True, self.grn_eps,
        )  # fmt: skip

    @property
    def multiplies_x(self) -> bool:
        """Whether fc1's weight's gradient is asked for, the only one that x takes part in."""
        return self.wanted[1]


def mlp(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None = None,
    act: str = "gelu",
    *,
    gate: str | None = None,
    grn: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """fc2(act(fc1(x))), or with one half of fc1 as the gate of the other, or a norm before fc2."""
    hidden = linear_act(x, weight1, bias1, act, gate=gate)
    if grn is not None:
        hidden = response(hidden, *grn, out_dtype=hidden.dtype)
    return linear_act(hidden, weight2, bias2)
