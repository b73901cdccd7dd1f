"""The residual connection with LayerScale and DropPath, in plain PyTorch: the definition."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Call(NamedTuple):
    """The arguments of `vitfast::residual_add` before `backend`, in the order of its schema.

    As in `vitfast.ops.residual_add`.
    """

    x: torch.Tensor
    branch: torch.Tensor
    gamma: torch.Tensor | None
    drop_scale: torch.Tensor | None


class BackwardCall(NamedTuple):
    """The arguments of `vitfast::residual_add_backward` before `backend`, in its schema's order.

    grad [..., C] is the gradient of the sum. branch is given only where gamma's gradient is wanted;
    branch_dtype is its dtype and that of its gradient. The others as in `vitfast.ops.residual_add`.
    """

    grad: torch.Tensor
    branch: torch.Tensor | None
    gamma: torch.Tensor | None
    drop_scale: torch.Tensor | None
    branch_dtype: torch.dtype

    def forward_call(self) -> Call:
        """The call that a backend's `can_run` is asked about; its x is the gradient."""
        branch = self.grad.new_empty(0, dtype=self.branch_dtype)  # it may not have been saved
        return Call(self.grad, branch, self.gamma, self.drop_scale)


def residual_add(
    x: torch.Tensor,
    branch: torch.Tensor,
    *,
    gamma: torch.Tensor | None = None,
    drop_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """x + drop_scale * gamma * branch (timm `Block`, `LayerScale`, `DropPath`)."""
    if gamma is not None:
        branch = branch * gamma
    if drop_scale is not None:
        branch = branch * per_sample(drop_scale, branch)
    return x + branch


def per_sample(drop_scale: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B] to [B, 1, ...], in the dtype of `like`: DropPath draws its factors in that."""
    return drop_scale.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def scale_gradients(
    grad: torch.Tensor,
    branch: torch.Tensor | None,
    gamma: torch.Tensor | None,
    drop_scale: torch.Tensor | None,
    branch_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of `residual_add` for branch, and for gamma where the branch is given."""
    if drop_scale is not None:
        grad = grad * per_sample(drop_scale, grad)
    dgamma = None
    if branch is not None and gamma is not None:
        dgamma = (grad * branch).flatten(0, -2).sum(0).to(gamma.dtype)
    if gamma is not None:
        grad = grad * gamma
    return grad.to(branch_dtype), dgamma


def drop_gradient(
    grad: torch.Tensor, branch: torch.Tensor, gamma: torch.Tensor | None, drop_scale: torch.Tensor
) -> torch.Tensor:
    """Gradient of `residual_add` for drop_scale, which nobody trains: no backend has a kernel."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    product = grad.to(dtype) * branch
    if gamma is not None:
        product = product * gamma
    return product.flatten(1).sum(1).to(drop_scale.dtype)
