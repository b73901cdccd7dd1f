"""Attention whose scores are so large that the rounding of their maximum is a number of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitfast import ops
from vitfast.ops.attention.triton_kernels import LARGE


@pytest.mark.usefixtures("chained_products")
@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize("scale", [1e3, 1e4, 1e5, 1e7, 1e15])
def test_attention(scale, sign):
    """Weights are 0 and 1 nearly everywhere; a negative scale turns which ones."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 49, 3, 2, 16, generator=g)
    x[:, :, :2] *= scale
    x.requires_grad_()
    wide = x.detach().double().requires_grad_()
    q, k, v = wide.unbind(2)
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * sign * 0.25).softmax(-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    out = ops.attention(x, scale=sign * 0.25, backend="triton")
    grad = torch.randn(out.shape, generator=g)
    (dx,) = torch.autograd.grad(out, x, grad)
    (dwide,) = torch.autograd.grad(expected, wide, grad.double())
    assert out.isfinite().all() and dx.isfinite().all()
    # Two scores may be as near as their rounding, one chance in many; then float32 picks either.
    assert ((out - expected).abs() < 1e-4).float().mean() > 0.99
    assert ((dx - dwide)[:, :, 2].abs() < 1e-4).float().mean() > 0.99


@pytest.mark.parametrize("fraction", [0.99, 1.0, 1.5, 2.0**20])
def test_one_multiply_add_stays_in_range(fraction):
    """The weight of the largest score, were s * factor - shift rounded once, as on a GPU."""
    top, factor = np.float32(fraction * LARGE.value), np.float32(1.4426950408889634 / 8)
    score = np.float32(top / factor)
    shift = score * factor
    power = np.exp2(np.ceil(np.log2(factor)))
    row_factor = factor if abs(shift) < LARGE.value else np.float32(power)
    shift = score * row_factor
    once = np.float64(score) * np.float64(row_factor) - np.float64(shift)
    assert abs(once) <= (4 if abs(shift) < LARGE.value else 0)
