"""What holds for dwconv_norm whatever the numbers; the generic tests compare with float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXtBlock

from vitfast.errors import BackendUnavailableError, InputValueError
from vitfast.ops import dwconv_norm, layer_norm, rms_norm
from vitfast.ops.dwconv_norm import native

pytestmark = pytest.mark.usefixtures("needs_native")
DTYPES = [torch.float32, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_first": lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
    "sliced": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "every_second_pixel": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}


def make(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(c, k=7, dtype=torch.float32):
    return (
        make(c, 1, k, k, dtype=dtype, seed=1) / k,
        *(make(c, dtype=dtype, seed=s) for s in (2, 3, 4)),
    )


def exact(x, weight, bias, norm_weight, norm_bias):
    """PyTorch's own convolution and norm in float64."""
    x, *others = (t.double() for t in (x, weight, bias, norm_weight, norm_bias))
    padding = [k // 2 for k in weight.shape[2:]]
    y = F.conv2d(x.movedim(-1, 1), *others[:2], padding=padding, groups=len(weight)).movedim(1, -1)
    return F.layer_norm(y, y.shape[-1:], *others[2:], 1e-6)


def train(*tensors, **options):
    """The result, and its gradients for all arguments."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = dwconv_norm(*leaves, **options)
    return y, *torch.autograd.grad(y, leaves, make(*y.shape, dtype=y.dtype, seed=5))


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- meaning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
def test_it_is_timms_block_up_to_its_mlp(low):
    block = ConvNeXtBlock(24, norm_layer=None)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.2)
    conv, norm = block.conv_dw, block.norm
    parts = (conv.weight, conv.bias, norm.weight, norm.bias)
    x = make(2, 24, 9, 8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        want = norm(conv(x).permute(0, 2, 3, 1))
        got = dwconv_norm(x.permute(0, 2, 3, 1), *parts, norm.eps, backend="cpu")
    assert got.dtype == want.dtype
    close = {"rtol": 0.02, "atol": 0.05} if low else {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(got, want, **close)
    grad = make(*want.shape, dtype=want.dtype, seed=1)
    ours, theirs = (torch.autograd.grad(y, (x, *parts), grad) for y in (got, want))
    close["atol"] *= 8  # sums of 144 pixels
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("k", range(1, 32, 2))
def test_every_odd_kernel(k):
    """As wide as high, and with either side 3; on a map that is smaller than most of them."""
    for kernel in ((k, k), (k, 3), (3, k)):
        weight = make(20, 1, *kernel) / math.sqrt(kernel[0] * kernel[1])
        parts = (make(2, 9, 11, 20), weight, *(make(20, seed=s) for s in (2, 3, 4)))
        leaves = [t.double().requires_grad_() for t in parts]
        want = exact(*leaves)
        want = (want, *torch.autograd.grad(want, leaves, make(*want.shape, seed=5).double()))
        for got, wanted in zip(train(*parts, backend="cpu"), want, strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_larger_kernel_is_left_to_the_reference():
    parts = (make(1, 3, 3, 4), make(4, 1, 33, 1))
    assert dwconv_norm(*parts).shape == (1, 3, 3, 4)
    with pytest.raises(BackendUnavailableError, match="33"):
        dwconv_norm(*parts, backend="cpu")


@pytest.mark.parametrize("channels", [1, 3, 15, 16, 17, 40, 64, 96, 100, 352, 1030])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 7), (5, 17), (16, 14), (3, 100)], ids=str)
def test_every_size(size, channels):
    parts = (make(2, *size, channels), *parameters(channels)[:2])
    want = F.conv2d(
        parts[0].double().movedim(-1, 1), *(t.double() for t in parts[1:]), padding=3,
        groups=channels,
    )  # fmt: skip
    got = dwconv_norm(*parts, norm=None, backend="cpu")
    torch.testing.assert_close(got.double(), want.movedim(1, -1), rtol=1e-5, atol=1e-5)


@each_dtype
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_it_is_the_norm_of_the_convolution(norm, dtype):
    x, (weight, bias, *affine) = make(2, 9, 10, 70, dtype=dtype), parameters(70, dtype=dtype)
    affine = affine if norm == "layer" else affine[:1]
    z = dwconv_norm(x, weight, bias, norm=None, out_dtype=torch.float32)
    got = dwconv_norm(x, weight, bias, *affine, norm=norm, out_dtype=torch.float32)
    want = {"layer": layer_norm, "rms": rms_norm}[norm](z, *affine)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_mean_far_from_zero_costs_no_more_than_its_rounding():
    x, (weight, _, *affine) = make(1, 8, 8, 96), parameters(96)
    parts = (x, weight, torch.full((96,), 300.0), *affine)
    error = (dwconv_norm(*parts, backend="cpu").double() - exact(*parts)).abs().max()
    assert error < 1e-3  # deviations of 1 that lie 300 from zero


def test_nan_reaches_the_kernels_window_and_no_further():
    x = make(2, 20, 21, 24)
    x[1, 9, 10, 3] = math.nan
    nan = dwconv_norm(x, *parameters(24), backend="cpu").isnan()
    assert nan[1, 6:13, 7:14].all() and nan.sum() == 49 * 24
    x[1, 9, 10, 3] = math.inf
    y = dwconv_norm(x, *parameters(24)[:2], norm=None, backend="cpu")
    assert (y[1, 6:13, 7:14, 3].isinf()).all() and (~y.isfinite()).sum() == 49


# ---- layout, stripes, threads --------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [7, 48, 50])
def test_the_layout_of_the_map_changes_no_bit(channels, layout, dtype):
    x, parts = make(2, 19, 23, channels, dtype=dtype), parameters(channels, dtype=dtype)
    changed = LAYOUTS[layout](x)
    assert torch.equal(changed, x)
    assert equal(train(changed, *parts, backend="cpu"), train(x, *parts, backend="cpu"))


@each_dtype
@pytest.mark.parametrize("norm", ["layer", "rms", None])
@pytest.mark.parametrize("stripe", [1, 2, 5, 16])
def test_stripes_are_the_whole_bit_for_bit(stripe, norm, dtype):
    x, (weight, bias, *affine) = make(1, 23, 90, 40, dtype=dtype), parameters(40, dtype=dtype)
    affine = {"layer": affine, "rms": affine[:1], None: []}[norm]
    whole = dwconv_norm(x, weight, bias, *affine, norm=norm, backend="cpu")
    for first in range(0, 23, stripe):
        last = min(first + stripe, 23)
        out = torch.full((1, last - first, 90, 40), math.nan, dtype=dtype)
        got = native.run(x, weight, bias, *affine, norm=norm, rows=(first, last), out=out)
        assert got is out and torch.equal(out, whole[:, first:last])


def test_stripes_of_several_images_and_bad_ones():
    x, (weight, *_) = make(3, 8, 9, 16), parameters(16)
    whole = dwconv_norm(x, weight)
    assert torch.equal(native.run(x, weight, rows=(3, 5)), whole[:, 3:5])
    assert native.run(x, weight, rows=(3, 3)).shape == (3, 0, 9, 16)
    for rows in ((-1, 3), (5, 3), (0, 9)):
        with pytest.raises(InputValueError, match="rows"):
            native.run(x, weight, rows=rows)
    with pytest.raises(InputValueError, match="out has shape"):
        native.run(x, weight, rows=(0, 2), out=torch.empty(3, 3, 9, 16))


@each_dtype
@pytest.mark.parametrize("shape", [(3, 37, 80, 19), (1, 7, 7, 200), (5, 4, 3, 33)])
def test_the_same_bits_with_any_number_of_threads(shape, dtype):
    parts = make(*shape, dtype=dtype), *parameters(shape[-1], dtype=dtype)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(train(*parts, backend="cpu"))
    assert all(equal(result, results[0]) for result in results[1:])


@each_dtype
@pytest.mark.parametrize("channels", [96, 90])
def test_large_calls_write_the_same_as_small_ones(channels, dtype):
    """They store past the caches where pixels are aligned, and do not where they are not."""
    x, parts = make(12, 90, 100, channels, dtype=dtype), parameters(channels, dtype=dtype)
    whole, dx = train(x, *parts, backend="cpu")[:2]
    grad = make(*whole.shape, dtype=dtype, seed=5)
    for b in (0, 11):
        leaf = x[b : b + 1].clone().requires_grad_()
        y = dwconv_norm(leaf, *parts, backend="cpu")
        (alone,) = torch.autograd.grad(y, leaf, grad[b : b + 1])
        assert equal((y[0], alone[0]), (whole[b], dx[b]))


def test_gradients_in_chunks_of_images_are_those_of_all(monkeypatch):
    parts = make(5, 8, 9, 24), *parameters(24)
    whole = train(*parts, backend="cpu")
    monkeypatch.setattr(native, "_CHUNK_BYTES", 2 * 8 * 9 * 24 * 4)
    chunked = train(*parts, backend="cpu")
    assert equal(whole[:2], chunked[:2])
    for a, b in zip(whole[2:], chunked[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ---- dtypes, memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["layer", None])
def test_autocast_rounds_the_operands_and_nothing_else(norm):
    """In float32 with autocast: as from bfloat16 operands; gradients are float32."""
    x, (weight, bias, *affine) = make(2, 9, 8, 40), parameters(40)
    affine = affine if norm else []
    low = [t.bfloat16() for t in (x, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        ours = train(x, weight, bias, *affine, norm=norm, backend="cpu")
    theirs = train(*low, *affine, norm=norm, backend="cpu")
    assert ours[0].dtype == torch.bfloat16 and torch.equal(ours[0], theirs[0])
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert a.dtype == torch.float32 and torch.equal(a.to(b.dtype), b)


@pytest.mark.parametrize("norm", ["layer", None])
def test_it_saves_two_numbers_a_pixel_for_its_norm(norm):
    x, (weight, *_) = make(2, 5, 6, 8).requires_grad_(), parameters(8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dwconv_norm(x, weight, norm=norm)
    extra = 0 if norm is None else 2 * 60
    assert sum(t.numel() for t in saved) == x.numel() + weight.numel() + extra


def test_statistics_that_were_not_saved_are_computed_again():
    tensors = [t.requires_grad_() for t in (make(2, 5, 6, 8), *parameters(8))]
    results = []
    for save in (True, False):
        y, stats = torch.ops.vitfast.dwconv_norm(
            *tensors, 1e-6, "layer", torch.float32, torch.float32, save, "cpu"
        )
        assert stats.shape == ((60, 2) if save else (0,))
        results.append(torch.autograd.grad(y, tensors, make(*y.shape, seed=5)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
