"""Scores so large that the rounding of their maximum is a number of its own: 2 to that power may be
infinite, unless each score has been rounded before the maximum is subtracted."""

from __future__ import annotations

import pytest
import torch

from vitfast import ops

SIZES = [(24, 49), (32, 64), (64, 17), (64, 130)]
SCALES = [1e3, 1e4, 3e4, 1e5, 1e7, 1e15]


def check(run, exact, x, scale):
    """run(x) of queries, keys and values [..., 3, H, D], against exact(x) of float64."""
    x = x.clone()
    x[..., :2, :, :] *= scale
    x.requires_grad_()
    wide = x.detach().double().requires_grad_()
    out, expected = run(x), exact(wide)
    grad = torch.randn(out.shape)
    (dx,), (dwide,) = (
        torch.autograd.grad(y, t, grad.to(y.dtype)) for y, t in ((out, x), (expected, wide))
    )
    assert out.isfinite().all() and dx.isfinite().all()
    # Two scores may be as near as their rounding, one chance in many; then float32 picks either.
    near = (out - expected).abs() < 1e-4
    assert near.float().mean() > 0.99
    assert ((dx - dwide)[..., 2, :, :].abs() < 1e-4).float().mean() > 0.99


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("dim", "tokens"), SIZES)
def test_attention(dim, tokens, scale, sign):
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(2, tokens, 3, 2, dim, generator=g)
    factor = sign * dim**-0.5

    def exact(x):  # not by scaled_dot_product_attention, which has the fault in its backward
        q, k, v = x.unbind(2)
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * factor).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    check(lambda x: ops.attention(x, scale=factor), exact, x, scale)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("window", [4, 7])
def test_windows(window, shift, biased, scale):
    g = torch.Generator().manual_seed(window + shift)
    x = torch.randn(1, 14, 16, 3, 2, 32, generator=g)
    table = torch.randn((2 * window - 1) ** 2, 2, generator=g) if biased else None

    def run(x):
        terms = None if table is None else table.to(x.dtype)
        return ops.window_attention(x, (window, window), (min(shift, window - 1),) * 2, terms)

    check(run, run, x, scale)
