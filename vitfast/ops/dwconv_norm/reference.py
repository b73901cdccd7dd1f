"""Depthwise convolution, then a norm over channels, in plain PyTorch: the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vitfast.ops.add_norm.reference import normalise


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
