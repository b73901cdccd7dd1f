"""What holds for patch_merge whatever the numbers; the generic tests compare with float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from timm.models import swin_transformer, swin_transformer_v2

from vitfast.ops import layer_norm, patch_merge, rms_norm

pytestmark = pytest.mark.usefixtures("needs_native")
DTYPES = [torch.float32, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
SIZES = [(8, 6), (7, 6), (8, 5), (7, 5), (1, 1), (1, 4)]


def make(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def train(x, weight=None, bias=None, **options):
    """The result, and its gradients for all arguments."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = patch_merge(*leaves, **options)
    return y, *torch.autograd.grad(y, leaves, make(*y.shape, dtype=y.dtype, seed=5))


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- meaning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("version", [1, 2])
def test_it_is_timms_merging_up_to_its_reduction(version, size, low):
    """Swin's norm is in between, Swin V2's behind; values, gradients and dtypes."""
    module = (swin_transformer, swin_transformer_v2)[version - 1].PatchMerging(12)
    for p in module.norm.parameters():
        torch.nn.init.normal_(p)
    leaves = [make(2, *size, 12).requires_grad_(), *module.parameters()]
    norm = module.norm
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        want = module(leaves[0])
        if version == 1:
            merged = patch_merge(leaves[0], norm.weight, norm.bias, norm.eps, backend="cpu")
            got = module.reduction(merged)
        else:
            got = norm(module.reduction(patch_merge(leaves[0], norm=None, backend="cpu")))
    assert got.dtype == want.dtype
    close = {"rtol": 0.02, "atol": 0.05} if low else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got, want, **close)
    grad = make(*want.shape, dtype=want.dtype, seed=1)
    ours, theirs = (torch.autograd.grad(y, leaves, grad, retain_graph=True) for y in (got, want))
    close["atol"] *= 4  # sums of up to 24 patches
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **close)


@each_dtype
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_the_norm_of_the_gathered_patches(size, dtype):
    """Forward and backward; to the bit where there is no padding, whose statistics are exact."""
    padded, tolerance = size[0] % 2 or size[1] % 2, 1e-5 if dtype == torch.float32 else 0.02
    x, weight, bias = make(2, *size, 13, dtype=dtype), *(make(52, seed=s) for s in (1, 2))
    gathered = patch_merge(x, norm=None, backend="cpu").requires_grad_()
    leaves = [gathered, *(t.detach().requires_grad_() for t in (weight, bias))]
    y = layer_norm(*leaves, 1e-5, backend="cpu")
    grads = torch.autograd.grad(y, leaves, make(*y.shape, dtype=dtype, seed=5))
    ours = train(x, weight, bias, backend="cpu")
    for a, b in zip((ours[0], *ours[2:]), (y, *grads[1:]), strict=True):
        assert torch.equal(a, b) or (
            padded and torch.allclose(a, b, rtol=tolerance, atol=tolerance)
        )
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(patch_merge(leaf, norm=None, backend="cpu"), leaf, grads[0])
    torch.testing.assert_close(ours[1], dx)
    y = patch_merge(x, weight, norm="rms", backend="cpu")
    assert torch.equal(y, rms_norm(gathered.detach(), weight, 1e-5, backend="cpu"))


@each_dtype
def test_gathering_keeps_every_value(dtype):
    x = make(1, 3, 4, 16, dtype=dtype)
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-40, 3e38]).to(dtype)
    x[0, 0, 0, :6], x[0, 2, 3, 10:] = special, special
    y = patch_merge(x, norm=None, backend="cpu")
    assert torch.equal(y[0, 0, 0, :16].view(torch.int16), x[0, 0, 0].view(torch.int16))
    assert torch.equal(y[0, 1, 1, 32:48].view(torch.int16), x[0, 2, 3].view(torch.int16))
    assert not y[:, 1].unflatten(-1, (2, 2, 16))[:, :, :, 1].any()  # below the last line
    low = patch_merge(x, norm=None, out_dtype=torch.bfloat16, backend="cpu")
    # Instruction sets differ in what they do to denormals.
    torch.testing.assert_close(low, y.bfloat16(), rtol=0, atol=1e-38, equal_nan=True)


@pytest.mark.parametrize("size", [(4, 1), (1, 4), (1, 1)], ids=str)
def test_padding_costs_no_accuracy(size):
    """The deviations of padding are one number many times: a float sum would drift."""
    x = make(32, *size, 384)
    rows = patch_merge(x, norm=None).double()
    exact = F.layer_norm(rows, (1536,), eps=1e-5)
    error = (patch_merge(x, backend="cpu").double() - exact)[..., -384:]  # zeros before the norm
    assert error.square().mean().sqrt() < 1e-8


def test_nan_stays_in_its_patch():
    x = make(2, 7, 6, 12)
    x[1, 6, 2, 3] = math.nan
    nan = patch_merge(x, backend="cpu").isnan()
    assert nan[1, 3, 1].all() and nan.sum() == 48


def test_under_autocast_a_map_keeps_its_dtype_as_layer_norm_does():
    for dtype in DTYPES:
        x = make(1, 4, 4, 8, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            assert patch_merge(x).dtype == F.layer_norm(x, (8,)).dtype
            assert patch_merge(x, out_dtype=torch.bfloat16).dtype == torch.bfloat16


# ---- determinism, memory -------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("norm", ["layer", None])
def test_the_same_bits_with_any_number_of_threads(norm, dtype):
    x = make(3, 37, 46, 19, dtype=dtype)
    affine = () if norm is None else (make(76, dtype=dtype), make(76, dtype=dtype, seed=1))
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(train(x, *affine, norm=norm, backend="cpu"))
    assert all(equal(result, results[0]) for result in results[1:])


@each_dtype
@pytest.mark.parametrize("channels", [96, 90])
@pytest.mark.parametrize("norm", ["layer", None])
def test_large_calls_write_the_same_as_small_ones(norm, channels, dtype):
    """They store past the caches where pixels are aligned, and do not where they are not."""
    x = make(12, 100, 101, channels, dtype=dtype)
    whole = train(x, norm=norm, backend="cpu")
    grad = make(*whole[0].shape, dtype=dtype, seed=5)
    for b in (0, 11):
        leaf = x[b : b + 1].clone().requires_grad_()
        y = patch_merge(leaf, norm=norm, backend="cpu")
        (dx,) = torch.autograd.grad(y, leaf, grad[b : b + 1])
        assert equal((y[0], dx[0]), (whole[0][b], whole[1][b]))


@pytest.mark.parametrize("norm", ["layer", None])
def test_it_saves_the_map_only_for_its_norm(norm):
    x = make(2, 5, 6, 8).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        patch_merge(x, norm=norm)
    assert sum(t.numel() for t in saved) == (0 if norm is None else x.numel() + 2 * 18)


def test_statistics_that_were_not_saved_are_computed_again():
    x, weight, bias = (t.requires_grad_() for t in (make(2, 5, 6, 8), make(32), make(32)))
    results = []
    for save in (True, False):
        y, stats = torch.ops.vitfast.patch_merge(x, weight, bias, 1e-5, "layer", None, save, "cpu")
        assert stats.shape == ((18, 2) if save else (0,))
        results.append(torch.autograd.grad(y, (x, weight, bias), make(*y.shape, seed=5)))
    assert equal(*results)
