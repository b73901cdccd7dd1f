"""Residual connection, then norm, in plain PyTorch: the definition."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vitfast.ops.layer_norm.reference import layer_norm
from vitfast.ops.residual_add.reference import residual_add
from vitfast.ops.rms_norm.reference import rms_norm


class Call(NamedTuple):
    """The arguments of `vitfast::add_norm` before `backend`, in the order of its schema.

    As in `vitfast.ops.add_norm`; save_stats says whether the statistics that the backward needs,
    [rows, 2] of mean (0 with "rms") and 1 / sqrt(var + eps), are returned beside the results.
    """

    x: torch.Tensor
    branch: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    gamma: torch.Tensor | None
    drop_scale: torch.Tensor | None
    norm: str
    out_dtype: torch.dtype | None
    save_stats: bool


class BackwardCall(NamedTuple):
    """The arguments of `vitfast::add_norm_backward` before `backend`, in the order of its schema.

    grad_residual and grad_normed [..., C] are the gradients of the two results, None where one is
    unused; residual [..., C] is the forward's; stats is what it saved. branch is given only where
    gamma's gradient is wanted. x_dtype is the dtype of x's gradient, branch_dtype that of the
    branch's, None where it is not wanted. The others as in `vitfast.ops.add_norm`.
    """

    grad_residual: torch.Tensor | None
    grad_normed: torch.Tensor | None
    residual: torch.Tensor
    branch: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    gamma: torch.Tensor | None
    drop_scale: torch.Tensor | None
    stats: torch.Tensor
    norm: str
    x_dtype: torch.dtype
    branch_dtype: torch.dtype | None

    def forward_call(self) -> Call:
        """The call that a backend's `can_run` is asked about; its x is the residual."""
        branch = self.residual.new_empty(0, dtype=self.branch_dtype)  # it may not have been saved
        return Call(
            self.residual, branch, self.weight, self.bias, self.eps, self.gamma, self.drop_scale,
            self.norm, self.x_dtype, True,
        )  # fmt: skip


def add_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    gamma: torch.Tensor | None = None,
    drop_scale: torch.Tensor | None = None,
    norm: str = "layer",
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual = x + drop_scale * gamma * branch; normed = norm(residual). Gives both."""
    residual = residual_add(x, branch, gamma=gamma, drop_scale=drop_scale)
    return residual, normalise(residual, weight, bias, eps, norm, out_dtype)


def normalise(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    norm: str,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    """`layer_norm` or `rms_norm` ("rms") of x over its last dimension."""
    if norm == "rms":
        return rms_norm(x, weight, eps, out_dtype=out_dtype)
    return layer_norm(x, weight, bias, eps, out_dtype=out_dtype)
