"""What holds for grn whatever the numbers; the generic tests compare with float64."""

from __future__ import annotations

import math

import pytest
import torch
from timm.layers.grn import GlobalResponseNorm

from vitfast.ops import grn
from vitfast.ops.grn import native

pytestmark = pytest.mark.usefixtures("needs_native")
DTYPES = [torch.float32, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
each_layout = pytest.mark.parametrize("planar", [False, True], ids=["nhwc", "nchw"])


def make(*shape, dtype=torch.float32, seed=0, planar=False):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.movedim(-1, 1).contiguous().movedim(1, -1) if planar else x


def train(x, weight, bias, **options):
    """The result, and its gradients for all arguments."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = grn(*leaves, **options)
    return y, *torch.autograd.grad(y, leaves, make(*y.shape, dtype=y.dtype, seed=5))


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- meaning -------------------------------------------------------------------------------------


@each_layout
@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
def test_it_is_timms_layer(low, planar):
    """Values, gradients, dtypes and, on both layouts, strides."""
    module = GlobalResponseNorm(12, channels_last=not planar)
    for p in module.parameters():
        torch.nn.init.normal_(p)
    x = make(2, 5, 7, 12, planar=planar)
    theirs = (x.movedim(-1, 1) if planar else x).clone().requires_grad_()
    ours = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        want = module(theirs)
        got = grn(ours, module.weight, module.bias, module.eps, backend="cpu")
    shown = got.movedim(-1, 1) if planar else got
    assert (shown.dtype, shown.stride()) == (want.dtype, want.stride())
    torch.testing.assert_close(shown, want)
    grad = make(*want.shape, seed=1)
    of_theirs = torch.autograd.grad(want, (theirs, *module.parameters()), grad)
    grad = grad.movedim(1, -1) if planar else grad
    dx, *of_ours = torch.autograd.grad(got, (ours, *module.parameters()), grad)
    dx = dx.movedim(-1, 1) if planar else dx
    assert dx.stride() == of_theirs[0].stride()
    for a, b in zip((dx, *of_ours), of_theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_zero_weights_and_biases_leave_the_map_alone():
    """As a new layer has them; to the bit."""
    x, zeros = make(2, 5, 6, 40), torch.zeros(40)
    assert torch.equal(grn(x, zeros, zeros, backend="cpu"), x)


def test_a_dead_channel_has_the_gradient_of_its_bias_alone():
    x = make(2, 4, 5, 24)
    x[..., 3] = 0
    y, dx, dweight, _ = train(x, *(make(24, seed=s) for s in (1, 2)), backend="cpu")
    assert y.isfinite().all() and dx.isfinite().all()
    assert dweight[3] == 0


def test_nan_stays_in_its_image():
    """Norms of all channels meet in their mean, but not those of other images."""
    x, weight, bias = make(2, 4, 5, 24), make(24), make(24)
    x[1, 2, 3, 4] = math.nan
    nan = grn(x, weight, bias, backend="cpu").isnan()
    assert nan[1].all() and not nan[0].any()


@each_dtype
def test_tokens_and_maps_are_the_same(dtype):
    x, affine = make(2, 6, 5, 24, dtype=dtype), [make(24, seed=s, dtype=dtype) for s in (1, 2)]
    of_map = grn(x, *affine, backend="cpu")
    assert torch.equal(grn(x.flatten(1, 2), *affine, backend="cpu"), of_map.flatten(1, 2))


def test_the_result_has_the_promoted_dtype():
    low = make(1, 2, 3, 8, dtype=torch.bfloat16)
    wide, narrow = make(8), make(8, dtype=torch.bfloat16)
    assert grn(low, wide, wide).dtype == torch.float32
    assert grn(low, narrow, narrow).dtype == torch.bfloat16
    assert grn(low, wide, wide, out_dtype=torch.bfloat16).dtype == torch.bfloat16


@each_layout
def test_statistics_keep_their_accuracy_over_many_positions(planar):
    """Of 129,600 positions as of 49: float sums alone would lose two digits."""
    x = make(1, 270, 480, 8, planar=planar).abs() + 1
    x[..., 0] *= 30
    weight, bias = torch.ones(8), torch.zeros(8)
    exact = grn(x.double(), weight.double(), bias.double(), backend="reference")
    relative = (grn(x, weight, bias, backend="cpu").double() / exact - 1).abs().max()
    assert relative < 4e-7


# ---- determinism, memory -------------------------------------------------------------------------


@each_dtype
@each_layout
@pytest.mark.parametrize("shape", [(3, 37, 46, 19), (5, 9, 9, 70), (1, 64, 64, 33)], ids=str)
def test_the_same_bits_with_any_number_of_threads(shape, planar, dtype):
    x = make(*shape, dtype=dtype, planar=planar)
    affine = [make(shape[-1], dtype=dtype, seed=s) for s in (1, 2)]
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(train(x, *affine, backend="cpu"))
    assert all(equal(result, results[0]) for result in results[1:])


@each_dtype
@each_layout
@pytest.mark.parametrize("channels", [96, 90])
def test_an_image_alone_has_the_same_bits(channels, planar, dtype):
    """Large calls store past the caches where rows are aligned, and share images out otherwise."""
    x = make(13, 100, 104, channels, dtype=dtype, planar=planar)
    affine = [make(channels, dtype=dtype, seed=s) for s in (1, 2)]
    y, dx, *_ = train(x, *affine, backend="cpu")
    grad = make(*x.shape, dtype=dtype, seed=5)
    for b in (0, 12):
        leaf = x[b : b + 1].clone(memory_format=torch.preserve_format).requires_grad_()
        alone = grn(leaf, *affine, backend="cpu")
        (of_alone,) = torch.autograd.grad(alone, leaf, grad[b : b + 1])
        assert equal((alone[0], of_alone[0]), (y[b], dx[b]))


@each_layout
def test_it_saves_its_input_and_a_number_a_channel(planar):
    x = make(2, 5, 6, 8, planar=planar).requires_grad_()
    affine = [make(8).requires_grad_() for _ in range(2)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        grn(x, *affine)
    assert sum(t.numel() for t in saved) == x.numel() + 2 * 8 + 2 * 8


# ---- the two halves ------------------------------------------------------------------------------


@each_dtype
def test_chunks_give_the_scale_of_the_whole(dtype):
    """What a layer folds into the product behind: x * scale + bias."""
    x, weight, bias = make(2, 70, 33, dtype=dtype), *(make(33, seed=s) for s in (1, 2))
    sums = torch.zeros(2, 33, dtype=torch.float64)
    for b in range(2):
        for chunk in x[b].split(23):
            native.accumulate(chunk, sums[b])
    torch.testing.assert_close(sums, x.double().square().sum(1), rtol=1e-6, atol=0)
    scale = native.scale_of(sums, weight, 1e-6)
    got = x.float() * scale[:, None] + bias
    torch.testing.assert_close(got, grn(x, weight, bias, backend="cpu"))


def test_a_chunk_has_the_same_sums_with_any_number_of_threads():
    x, results = make(3000, 50), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        sums = torch.zeros(50, dtype=torch.float64)
        native.accumulate(x, sums)
        native.accumulate(x[::2], sums)
        results.append(sums)
    assert all(torch.equal(r, results[0]) for r in results[1:])


def test_sums_of_another_kind_are_refused():
    x = make(4, 8)
    for sums in (torch.zeros(8), torch.zeros(7, dtype=torch.float64)):
        with pytest.raises(ValueError, match="float64"):
            native.accumulate(x, sums)
        with pytest.raises(ValueError, match="float64"):
            native.scale_of(sums[None], make(8), 1e-6)
