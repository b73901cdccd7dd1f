"""Depthwise convolution, then a norm over channels, in plain PyTorch: the definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from vitfast.ops.add_norm.reference import normalise
from vitfast.ops.common.autodiff import gradients

INPUTS = ("x", "weight", "bias", "norm_weight", "norm_bias")
"""Differentiable inputs, in the order of the outputs of `vitfast::dwconv_norm_backward`."""


class Call(NamedTuple):
    """The arguments of `vitfast::dwconv_norm` before `backend`, in the order of its schema.

    Args:
        x, weight, bias, norm_weight, norm_bias, eps, norm: as in `dwconv_norm`.
        dtype: what x, weight and bias are rounded to before they are multiplied.
        out_dtype: dtype of the result.
        save_stats: whether mean and 1 / sqrt(var + eps) of each row, [B * H * W, 2] in float32
            (float64 for float64), are returned as well; else an empty tensor is.
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    norm_weight: torch.Tensor | None
    norm_bias: torch.Tensor | None
    eps: float
    norm: str | None
    dtype: torch.dtype
    out_dtype: torch.dtype
    save_stats: bool


class BackwardCall(NamedTuple):
    """The arguments of `vitfast::dwconv_norm_backward` before `backend`, in its order.

    Args:
        grad: [B, H, W, C], of the result and in its dtype.
        stats: as the forward returned them; empty where there is no norm.
        wanted: for each of `INPUTS`, whether its gradient is wanted; False where it is None.
        Others: as in `Call`.
    """

    grad: torch.Tensor
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    norm_weight: torch.Tensor | None
    norm_bias: torch.Tensor | None
    eps: float
    norm: str | None
    dtype: torch.dtype
    stats: torch.Tensor
    wanted: list[bool]

    @property
    def forward(self) -> Call:
        """The forward that this is the backward of."""
        return Call(
            self.x, self.weight, self.bias, self.norm_weight, self.norm_bias, self.eps, self.norm,
            self.dtype, self.grad.dtype, save_stats=True,
        )  # fmt: skip

    @property
    def inputs(self) -> tuple[torch.Tensor | None, ...]:
        """The tensors that `INPUTS` names."""
        return self.x, self.weight, self.bias, self.norm_weight, self.norm_bias


def dwconv_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    norm: str | None = "layer",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """timm `ConvNeXtBlock` up to its MLP; the convolution's result is not rounded in between."""
    y = convolve(x, weight, bias)
    out_dtype = out_dtype or x.dtype
    if norm is None:
        return y.to(out_dtype)
    return normalise(y, norm_weight, norm_bias, eps, norm, out_dtype)


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The convolution of [B, H, W, C], zero-padded to the same size, in float32 or better."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if x.numel() == 0:  # torch's convolution refuses some; parameters get gradients of zero
        y = x * weight.sum((1, 2, 3))
        return y if bias is None else y + bias
    y = F.conv2d(
        x.permute(0, 3, 1, 2),
        weight,
        bias,
        padding=(weight.shape[2] // 2, weight.shape[3] // 2),
        groups=x.shape[3],
    )
    return y.permute(0, 2, 3, 1)


def convolve_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    wanted: Sequence[bool],
) -> dict[str, torch.Tensor]:
    """Gradients of `convolve` by the names of its arguments, those that are wanted.

    Args:
        grad: [B, H, W, C], in float32 or better.
        wanted: of x, weight and bias.
    """
    names = ("x", "weight", "bias")
    if x.numel() == 0:
        found = gradients(convolve, (x, weight, bias), (grad,))
    else:
        padding = (weight.shape[2] // 2, weight.shape[3] // 2)
        found = torch.ops.aten.convolution_backward(
            grad.permute(0, 3, 1, 2), x.to(grad.dtype).permute(0, 3, 1, 2), weight.to(grad.dtype),
            None if bias is None else bias.shape, (1, 1), padding, (1, 1), False, (0, 0),
            x.shape[3], list(wanted),
        )  # fmt: skip
        if found[0] is not None:
            found = (found[0].permute(0, 2, 3, 1).contiguous(), *found[1:])
    return {
        name: t.to(given.dtype)
        for name, t, given, asked in zip(names, found, (x, weight, bias), wanted, strict=True)
        if asked and given is not None
    }
