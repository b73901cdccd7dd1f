"""What holds for norm_add whatever the numbers; the generic tests compare with float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from timm.layers import DropPath
from timm.models.swin_transformer_v2 import SwinTransformerV2Block

from vitfast.ops import layer_norm, norm_add, residual_add, rms_norm
from vitfast.ops.common import norm as norm_op

pytestmark = pytest.mark.usefixtures("needs_native")
DTYPES = [torch.float32, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])

# Rows for several threads and blocks of the backward, the last of them not full.
SHAPE = B, N, C = 3, 341, 77


def make(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def arguments(dtype):
    """x, branch, weight, bias."""
    x, branch = make(*SHAPE, dtype=dtype), make(*SHAPE, dtype=dtype, seed=1)
    return x, branch, *(1 + 0.1 * make(C, dtype=dtype, seed=s) for s in (2, 3))


def train(arguments, **options):
    """The result, and its gradients for all arguments."""
    leaves = [t.detach().requires_grad_() for t in arguments]
    y = norm_add(*leaves, **options)
    return y, *torch.autograd.grad(y, leaves, make(*y.shape, dtype=y.dtype, seed=5))


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- meaning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
def test_it_is_the_connection_of_timms_block(low):
    """`x + drop_path1(norm1(branch))`: values, dtype, the draw of stochastic depth."""
    block = SwinTransformerV2Block(32, (8, 8), 2, drop_path=0.5).train()
    torch.nn.init.normal_(block.norm1.weight)
    torch.nn.init.normal_(block.norm1.bias)
    x, branch = make(6, 8, 8, 32), make(6, 8, 8, 32, seed=1)
    branch = branch.bfloat16() if low else branch
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        torch.manual_seed(0)
        expected = x + block.drop_path1(block.norm1(branch))
        torch.manual_seed(0)
        scale = branch.new_empty(6).bernoulli_(0.5).div_(0.5)
        norm = block.norm1
        got = norm_add(x, branch, norm.weight, norm.bias, norm.eps, drop_scale=scale)
    assert isinstance(block.drop_path1, DropPath) and 0 < scale.sum() < 12
    assert got.dtype == expected.dtype == torch.float32
    close = {"rtol": 0.01, "atol": 0.03} if low else {"rtol": 1e-6, "atol": 1e-5}
    torch.testing.assert_close(got, expected, **close)


def test_the_dtype_follows_torch():
    weight = make(8)
    for x, branch, w in itertools.product(DTYPES, DTYPES, [weight, weight.bfloat16(), None]):
        tensors = make(2, 3, 8, dtype=x), make(2, 3, 8, dtype=branch)
        expected = tensors[0] + layer_norm(tensors[1], w)
        got = norm_add(*tensors, w, backend="cpu")
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=0.01, atol=0.02)


@each_dtype
def test_it_is_what_the_single_ops_give(arguments):
    x, branch, weight, bias = arguments
    scale = torch.tensor([0.0, 1.25, 1.0])
    for norm, normed in (
        ("layer", layer_norm(branch, weight, bias, out_dtype=torch.float32)),
        ("rms", rms_norm(branch, weight, out_dtype=torch.float32)),
    ):
        b = bias if norm == "layer" else None
        want = residual_add(x.float(), normed, drop_scale=scale).to(x.dtype)
        got = norm_add(x, branch, weight, b, drop_scale=scale, norm=norm, backend="cpu")
        torch.testing.assert_close(got, want)


@each_dtype
def test_a_dropped_sample_passes_x_through(arguments):
    y, dx, dbranch, *_ = train(arguments, drop_scale=torch.tensor([1.25, 0.0, 1.25]))
    assert torch.equal(y[1], arguments[0][1]) and not torch.equal(y[0], arguments[0][0])
    assert dbranch[1].abs().max() == 0 and dbranch[0].abs().max() > 0 and dx[1].any()


@each_dtype
def test_nan_in_either_stays_in_its_row(arguments):
    for which in (0, 1):
        tensors = [t.clone() for t in arguments]
        tensors[which][1, 5, 8] = float("nan")
        nan = norm_add(*tensors, backend="cpu").isnan()
        assert nan[1, 5].sum() == (1 if which == 0 else C)
        assert nan.sum() == nan[1, 5].sum()


# ---- determinism, memory -------------------------------------------------------------------------


@each_dtype
def test_the_same_bits_with_any_number_of_threads(arguments):
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(train(arguments, drop_scale=torch.tensor([0.0, 1.5, 1.0])))
    assert all(equal(result, results[0]) for result in results[1:])


@each_dtype
@pytest.mark.parametrize("size", [(3, 41, 40), (3, 3000, 512)], ids=["cached", "past_the_caches"])
def test_the_result_may_replace_either_input(dtype, size):
    x, branch = make(*size, dtype=dtype), make(*size, dtype=dtype, seed=1)
    want = norm_add(x, branch, backend="cpu")
    for over in ("x", "branch"):
        a, b = x.clone(), branch.clone()
        norm_op.forward(norm_op.LAYER, b, base=a, normed_out=a if over == "x" else b)
        assert torch.equal(a if over == "x" else b, want)
    parts = zip(x.split(500, 1), branch.split(500, 1), strict=True)
    assert torch.equal(torch.cat([norm_add(a, b, backend="cpu") for a, b in parts], 1), want)


def test_it_saves_the_branch_and_two_numbers_a_row():
    x, branch, weight, bias = (
        t.requires_grad_() for t in (make(2, 5, 8), make(2, 5, 8), make(8), make(8))
    )
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        norm_add(x, branch, weight, bias)
    assert sorted(t.numel() for t in saved) == [8, 8, 2 * 10, 80]
    assert not any(t.data_ptr() == x.data_ptr() for t in saved)


# ---- gradients -----------------------------------------------------------------------------------


@each_dtype
def test_gradients_are_those_of_the_norm_and_of_the_sum(arguments):
    _, dx, *others = train(arguments)
    grad = make(*SHAPE, dtype=dx.dtype, seed=5)
    leaves = [t.detach().requires_grad_() for t in arguments[1:]]
    assert torch.equal(dx, grad)
    assert equal(others, torch.autograd.grad(layer_norm(*leaves), leaves, grad))


@each_dtype
def test_statistics_that_were_not_saved_are_computed_again(arguments):
    x, *leaves = (t.detach().requires_grad_() for t in arguments)
    results = []
    for save in (True, False):
        y, stats = torch.ops.vitfast.norm_add(x, *leaves, 1e-6, None, "layer", x.dtype, save, "cpu")
        assert stats.shape == ((B * N, 2) if save else (0,))
        results.append(torch.autograd.grad(y, leaves, make(*SHAPE, dtype=y.dtype, seed=5)))
    assert equal(*results)


def test_gradient_of_drop_scale():
    x, branch, weight, bias = make(3, 5, 8), make(3, 5, 8, seed=1), make(8), make(8, seed=2)
    scale = torch.tensor([0.5, 0.0, 2.0], requires_grad=True)
    grad = make(3, 5, 8, seed=7)
    y = norm_add(x, branch, weight, bias, drop_scale=scale)
    (got,) = torch.autograd.grad(y, scale, grad)
    want = (grad * layer_norm(branch, weight, bias)).sum((1, 2))
    torch.testing.assert_close(got, want)


def test_a_float16_branch_beside_a_float32_stream():
    """Autocast's mix on some devices: forward and backward by the reference."""

    def run(backend):
        x = make(2, 5, C).requires_grad_()
        branch = make(2, 5, C, dtype=torch.float16, seed=1).requires_grad_()
        y = norm_add(x, branch, drop_scale=torch.tensor([0.0, 1.25]), backend=backend)
        grads = torch.autograd.grad(y, (x, branch), make(2, 5, C, seed=3))
        assert [g.dtype for g in grads] == [torch.float32, torch.float16]
        return y, *grads

    assert equal(run("auto"), run("reference"))
