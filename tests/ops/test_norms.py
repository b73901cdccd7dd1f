"""What holds for the norm kernels whatever the numbers; the generic tests compare with float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale

from vitfast.errors import DeviceError, InputTypeError, InputValueError
from vitfast.ops import (  # fmt: skip
    add_norm,
    layer_norm,
    norm_add,
    patch_merge,
    residual_add,
    rms_norm,
    spec_of,
)
from vitfast.ops.common import norm as norm_op
from vitfast.runtime import native
from vitfast.settings import ISA_LEVELS, settings
from vitfast.testing.cases import Case
from vitfast.testing.errors import raise_if_wrong

DTYPES = [torch.float32, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
pytestmark = pytest.mark.usefixtures("needs_native")

# Rows for several threads and blocks of the backward, the last of them not full.
B, N, C = 3, 341, 77
OPS = ["layer_norm", "rms_norm", "add_norm", "norm_add", "residual_add", "patch_merge"]


def make(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def arguments(dtype):
    """x, branch, weight, bias, gamma of add_norm."""
    return (
        make(B, N, C, dtype=dtype),
        make(B, N, C, dtype=dtype, seed=1),
        *(1 + 0.1 * make(C, dtype=dtype, seed=s) for s in (2, 3, 4)),
    )


def train(arguments, **options):
    """Outputs of add_norm, and its gradients for all arguments."""
    x, branch, weight, bias, gamma = (t.detach().requires_grad_() for t in arguments)
    outputs = add_norm(x, branch, weight, bias, gamma=gamma, backend="cpu", **options)
    grads = [make(*o.shape, dtype=o.dtype, seed=5 + i) for i, o in enumerate(outputs)]
    return *outputs, *torch.autograd.grad(outputs, (x, branch, weight, bias, gamma), grads)


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- determinism, instruction sets ---------------------------------------------------------------


@each_dtype
def test_the_same_bits_with_any_number_of_threads(arguments):
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(train(arguments, drop_scale=torch.tensor([0.0, 1.5, 1.0])))
    assert all(equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("level", ISA_LEVELS)
@pytest.mark.parametrize("name", OPS)
def test_every_instruction_set(name, level):
    if ISA_LEVELS.index(level) > native.native().best_isa():
        pytest.skip(f"this CPU has no {level}")
    settings.cpu_isa = level
    assert native.isa() == level
    spec = spec_of(name)
    wanted = {
        "prime_width", "width_1023", "width_1", "autocast_training", "to_bfloat16", "rms",
        "odd_sizes", "gathered", "rows_for_many_blocks",
    }  # fmt: skip
    samples = [s for s in spec.samples if s.name in wanted]
    assert len(samples) >= 2
    for sample, dtype in itertools.product(samples, DTYPES):
        case = Case(spec, sample, dtype)
        raise_if_wrong(case.judge(case.call.run(spec.public, backend="cpu")))
        raise_if_wrong(case.judge_gradients(case.gradients(case.trained, backend="cpu")))


# ---- what each op means --------------------------------------------------------------------------


@each_dtype
def test_normed_is_the_norm_of_the_residual_as_returned(arguments):
    x, branch, weight, bias, gamma = arguments
    residual, normed = add_norm(x, branch, weight, bias, 1e-5, gamma=gamma, backend="cpu")
    assert torch.equal(residual, residual_add(x, branch, gamma=gamma, backend="cpu"))
    assert torch.equal(normed, layer_norm(residual, weight, bias, 1e-5, backend="cpu"))
    _, normed = add_norm(x, branch, weight, None, 1e-5, gamma=gamma, norm="rms", backend="cpu")
    assert torch.equal(normed, rms_norm(residual, weight, 1e-5, backend="cpu"))


@each_dtype
def test_a_dropped_sample_passes_x_through(arguments):
    x, branch, *_, gamma = arguments
    drop_scale = torch.tensor([1.25, 0.0, 1.25])
    residual = residual_add(x, branch, gamma=gamma, drop_scale=drop_scale, backend="cpu")
    assert torch.equal(residual[1], x[1])
    assert not torch.equal(residual[0], x[0])
    gradients = train(arguments, drop_scale=drop_scale)[2:]
    assert gradients[1][1].abs().max() == 0
    assert gradients[1][0].abs().max() > 0


@pytest.mark.parametrize("shape", [(6, 5, 8), (6, 8), (6, 2, 3, 8)])
def test_drop_scale_is_what_timm_draws(shape):
    x, branch = make(*shape), make(*shape, seed=1)
    drop_path, layer_scale = DropPath(0.5).train(), LayerScale(8, 0.3)
    torch.manual_seed(0)
    expected = x + drop_path(layer_scale(branch))
    torch.manual_seed(0)
    drop_scale = branch.new_empty(6).bernoulli_(0.5).div_(0.5)
    assert 0 < drop_scale.sum() < 12
    for scale in (drop_scale, drop_scale.bfloat16()):
        ours = residual_add(x, branch, gamma=layer_scale.gamma, drop_scale=scale, backend="cpu")
        torch.testing.assert_close(ours, expected)


def test_residual_dtype_follows_torch():
    for x, branch, gamma in itertools.product(DTYPES, DTYPES, [*DTYPES, None]):
        tensors = make(2, 3, 8, dtype=x), make(2, 3, 8, dtype=branch)
        scale = None if gamma is None else make(8, dtype=gamma)
        expected = tensors[0] + (tensors[1] if scale is None else tensors[1] * scale)
        residual, normed = add_norm(*tensors, gamma=scale, backend="cpu")
        assert residual.dtype == normed.dtype == expected.dtype
        # torch rounds gamma * branch as well.
        torch.testing.assert_close(residual, expected, rtol=0.01, atol=0.02)
        assert add_norm(*tensors, out_dtype=torch.bfloat16)[1].dtype == torch.bfloat16


def test_autocast_leaves_dtypes_alone_as_torch_does():
    for dtype in DTYPES:
        x = make(2, 8, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer_norm(x).dtype == F.layer_norm(x, (8,)).dtype
            assert rms_norm(x).dtype == F.rms_norm(x, (8,)).dtype
            assert residual_add(x, x.bfloat16()).dtype == (x + x.bfloat16()).dtype


# ---- numbers that break careless kernels ---------------------------------------------------------


@pytest.mark.parametrize("mean", [1e3, 1e4, -1e4])
def test_a_mean_far_from_zero_costs_no_accuracy(mean):
    x = make(64, 768) + mean
    exact = F.layer_norm(x.double(), (768,), eps=1e-6)
    error = (layer_norm(x, backend="cpu").double() - exact).abs().max()
    assert error < 1e-6


def test_constant_rows_give_the_bias_exactly():
    bias = make(C)
    y = layer_norm(torch.full((4, C), 3.7), None, bias, 1e-12, backend="cpu")
    assert torch.equal(y, bias.expand(4, C))


@each_dtype
def test_nan_and_infinity_stay_in_their_row(dtype):
    x = make(5, C, dtype=dtype)
    clean = layer_norm(x, backend="cpu")
    x[1, 3], x[3, 76] = float("nan"), float("inf")
    y = layer_norm(x, backend="cpu")
    assert y[[1, 3]].isnan().all()
    assert torch.equal(y[[0, 2, 4]], clean[[0, 2, 4]])


def test_gradients_overflow_to_infinity():
    bias = torch.zeros(C, requires_grad=True)
    y = layer_norm(make(40, C), None, bias, backend="cpu")
    (grad,) = torch.autograd.grad(y, bias, torch.full((40, C), 3e38))
    assert grad.isposinf().all()


# ---- memory --------------------------------------------------------------------------------------


@each_dtype
def test_outputs_may_be_row_slices_of_larger_tensors(arguments):
    x, branch, weight, bias, gamma = arguments
    named = {"gamma": gamma, "weight": weight, "bias": bias}
    expected = norm_op.forward(norm_op.LAYER, x, branch=branch, **named)
    large = [torch.full((B, N + 9, C), float("nan"), dtype=x.dtype) for _ in range(2)]
    residual, normed = (t[:, 4 : N + 4] for t in large)
    for rows in (slice(0, 100), slice(100, N)):
        got = norm_op.forward(
            norm_op.LAYER, x[:, rows], branch=branch[:, rows], **named,
            residual_out=residual[:, rows], normed_out=normed[:, rows],
        )  # fmt: skip
        assert got[0].data_ptr() == residual[:, rows].data_ptr()
    assert equal((residual, normed), expected[:2])
    assert all(t[:, :4].isnan().all() and t[:, N + 4 :].isnan().all() for t in large)
    for wrong in (torch.empty(B, N, C + 1), torch.empty(B, C, N).mT):
        with pytest.raises(InputValueError, match="output of shape"):
            norm_op.forward(norm_op.LAYER, x, normed_out=wrong)


@each_dtype
@pytest.mark.parametrize("size", [(3, 41, 40), (3, 2800, 512)], ids=["cached", "past_the_caches"])
def test_outputs_may_replace_inputs(dtype, size):
    x, branch = make(*size, dtype=dtype), make(*size, dtype=dtype, seed=1)
    residual, normed, _ = norm_op.forward(norm_op.RMS, x, branch=branch)
    a, b = x.clone(), branch.clone()
    norm_op.forward(norm_op.RMS, a, branch=b, residual_out=a, normed_out=b)
    assert equal((a, b), (residual, normed))
    c = branch.clone()
    assert torch.equal(norm_op.forward(norm_op.NONE, x, branch=c, residual_out=c)[0], residual)


def test_large_calls_write_the_same_as_small_ones():
    """They store past the caches where rows are aligned, and do not where they are not."""
    x = make(4096 * 1024 + 16)
    for offset in (0, 16, 1):
        rows = x[offset : offset + 4096 * 1024].view(4096, 1024)
        whole = add_norm(rows, rows, backend="cpu")
        parts = [add_norm(part, part, backend="cpu") for part in rows.split(500)]
        assert equal(whole, [torch.cat(p) for p in zip(*parts, strict=True)])


def test_the_kernel_refuses_impossible_arguments():
    x = torch.zeros(2, 4)
    rows = (x.data_ptr(), 0, 4, 4)

    def call(
        kind=0, sizes=(1, 2, 4), x=rows, branch=None, residual=None, normed=rows, base=None,
        normed_scale=0, threads=1,
    ):  # fmt: skip
        native.native().norm_forward(
            kind, *sizes, x, branch, residual, normed, None, None, None, 0, base, normed_scale,
            1e-6, 0, threads,
        )  # fmt: skip

    def backward(kind=0, sizes=(1, 2, 4), grad=rows, residual=rows, dx=rows, scale=0, branch=None):
        native.native().norm_backward(
            kind, *sizes, grad, None, residual, None, dx, branch, *(None,) * 5, 0, scale, 1e-6, 0, 1
        )

    patches = (x.data_ptr(), 0, 8, 4, 2, 3, 1)  # 2 x 3 pixels of one channel
    call()
    call(x=patches)
    backward()
    backward(residual=patches, dx=patches)
    for wrong in (
        {"kind": 3}, {"kind": 2}, {"sizes": (1, 0, 4)}, {"sizes": (1, 2, -4)}, {"x": None},
        {"x": (0, 0, 4, 4)}, {"x": (x.data_ptr(), 2, 4, 4)}, {"branch": rows}, {"normed": None},
        {"residual": rows}, {"threads": 0},
        {"branch": rows, "residual": (x.data_ptr(), 1, 4, 4)}, {"normed_scale": x.data_ptr()},
        {"kind": 2, "normed": None, "residual": rows, "base": rows},
        {"branch": rows, "residual": rows, "base": rows}, {"base": patches}, {"normed": patches},
        {"x": patches, "branch": rows, "residual": rows}, {"x": patches, "sizes": (1, 3, 4)},
        {"x": patches, "sizes": (1, 2, 3)}, {"x": (x.data_ptr(), 0, 8, 4, 0, 3, 1)},
        {"x": (0, 0, 8, 4, 2, 3, 1)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="norm"):
            call(**wrong)
    for wrong in (
        {"grad": None}, {"residual": patches}, {"dx": patches}, {"grad": patches},
        {"residual": patches, "dx": patches, "branch": rows},
        {"residual": patches, "dx": patches, "sizes": (1, 1, 4)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="norm"):
            backward(**wrong)


# ---- gradients -----------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("used", ["residual", "normed"])
def test_one_output_alone(arguments, used):
    x, branch, weight, bias, gamma = (t.detach().requires_grad_() for t in arguments)
    residual, normed = add_norm(x, branch, weight, bias, gamma=gamma, backend="cpu")
    output = residual if used == "residual" else normed
    grad = make(B, N, C, dtype=output.dtype, seed=9)
    got = torch.autograd.grad(output, (x, branch, weight, bias, gamma), grad)
    if used == "residual":
        assert torch.equal(got[0], grad)
        assert got[2].abs().max() == got[3].abs().max() == 0
        scale = residual_add(x, branch, gamma=gamma, backend="cpu")
        assert equal(torch.autograd.grad(scale, (branch, gamma), grad), (got[1], got[4]))
    else:
        y = layer_norm(residual.detach().requires_grad_(), weight, bias, backend="cpu")
        assert equal(torch.autograd.grad(y, (weight, bias), grad), got[2:4])


@each_dtype
def test_statistics_that_were_not_saved_are_computed_again(arguments):
    """torch.ops.vitfast.* is differentiable as it stands, whatever save_stats says."""
    x, branch, weight, bias, _ = (t.detach().requires_grad_() for t in arguments)
    grad = make(B, N, C, dtype=x.dtype, seed=9)
    results = []
    for save in (True, False):
        y, stats = torch.ops.vitfast.layer_norm(x, weight, bias, 1e-6, None, save, "cpu")
        z, _ = torch.ops.vitfast.rms_norm(x, weight, 1e-6, None, save, "cpu")
        _, r, _ = torch.ops.vitfast.add_norm(
            x, branch, weight, bias, 1e-6, None, None, "layer", None, save, "cpu"
        )
        assert stats.shape == ((B * N, 2) if save else (0,))
        assert not stats.requires_grad
        results.append([torch.autograd.grad(o, (x, weight), grad) for o in (y, z, r)])
    for saved, again in zip(*results, strict=True):
        assert equal(saved, again)


def test_saved_statistics_match_the_reference():
    x = make(2, 5, C) * 3 + 1
    for kind in (norm_op.LAYER, norm_op.RMS):
        stats = norm_op.forward(kind, x, save_stats=True)[2]
        torch.testing.assert_close(stats, norm_op.reference_stats(kind, x, 1e-6))


def test_plain_sums_share_one_gradient():
    """Without LayerScale and DropPath nothing is written twice; the values are those of x + y."""
    x, branch = (make(2, 5, 8, seed=s).requires_grad_() for s in (0, 1))
    grads = torch.autograd.grad(residual_add(x, branch, backend="cpu"), (x, branch), make(2, 5, 8))
    assert equal(grads, (make(2, 5, 8),) * 2)
    low = branch.detach().bfloat16().requires_grad_()
    for output in (residual_add(x, low), *add_norm(x, low)):
        grads = torch.autograd.grad(output, (x, low), make(2, 5, 8), retain_graph=True)
        assert [g.dtype for g in grads] == [torch.float32, torch.bfloat16]
        assert torch.equal(grads[0].bfloat16(), grads[1])


def test_gradient_of_drop_scale():
    x, branch, gamma = (make(*s, seed=i) for i, s in enumerate([(3, 5, 8), (3, 5, 8), (8,)]))
    drop_scale = torch.tensor([0.5, 0.0, 2.0], requires_grad=True)
    grad = make(3, 5, 8, seed=7)
    (got,) = torch.autograd.grad(
        residual_add(x, branch, gamma=gamma, drop_scale=drop_scale), drop_scale, grad
    )
    torch.testing.assert_close(got, (grad * branch * gamma).sum((1, 2)))


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (0, 8)])
def test_empty_tensors_have_zero_weight_gradients(shape):
    x, branch = (torch.empty(shape, requires_grad=True) for _ in range(2))
    weight, bias, gamma = (torch.ones(8, requires_grad=True) for _ in range(3))
    residual, normed = add_norm(x, branch, weight, bias, gamma=gamma)
    (residual.sum() + normed.sum()).backward()
    assert residual.shape == normed.shape == x.grad.shape == branch.grad.shape == shape
    assert all(torch.equal(t.grad, torch.zeros(8)) for t in (weight, bias, gamma))


# ---- bad arguments -------------------------------------------------------------------------------


def test_bad_arguments_are_refused_before_anything_runs():
    x, vector = torch.zeros(2, 3, 8), torch.zeros(8)
    cases = [
        (InputValueError, "weight", lambda: layer_norm(x, torch.zeros(7))),
        (InputValueError, "scalar", lambda: rms_norm(torch.zeros(()))),
        (InputValueError, "eps", lambda: layer_norm(x, eps=0.0)),
        (InputTypeError, "x must be", lambda: layer_norm([1.0])),
        (InputTypeError, "int64", lambda: rms_norm(x.long())),
        (InputTypeError, "out_dtype", lambda: layer_norm(x, out_dtype=torch.int32)),
        (InputValueError, "branch", lambda: residual_add(x, x[:1])),
        (InputValueError, "gamma", lambda: residual_add(x, x, gamma=torch.zeros(2, 8))),
        (InputValueError, "drop_scale", lambda: residual_add(x, x, drop_scale=torch.ones(3))),
        (InputValueError, "1-D", lambda: residual_add(vector, vector, drop_scale=torch.ones(8))),
        (InputValueError, "norm must be", lambda: add_norm(x, x, norm="batch")),
        (InputValueError, "no bias", lambda: add_norm(x, x, vector, vector, norm="rms")),
        (InputValueError, "norm must be", lambda: norm_add(x, x, norm="batch")),
        (InputValueError, "B, H, W, C", lambda: patch_merge(x)),
        (InputValueError, "32", lambda: patch_merge(x[None], vector)),
        (DeviceError, "meta", lambda: add_norm(x, x, vector.to("meta"))),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


# ---- mixed dtypes --------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [False, True])
@pytest.mark.parametrize("op", [residual_add, add_norm])
def test_a_float16_branch_beside_a_float32_residual(op, gamma):
    """Autocast's mix, in which the kernels have no say: forward and backward by the reference."""

    def run(backend):
        x = make(2, 5, C).requires_grad_()
        branch = make(2, 5, C, dtype=torch.float16, seed=1).requires_grad_()
        scale = torch.tensor([0.0, 1.25])
        options = {"gamma": 1 + 0.1 * make(C, seed=2)} if gamma else {}
        found = op(x, branch, drop_scale=scale, backend=backend, **options)
        found = found if isinstance(found, tuple) else (found,)
        grads = torch.autograd.grad(found, (x, branch), [make(*t.shape, seed=3) for t in found])
        assert [g.dtype for g in grads] == [torch.float32, torch.float16]
        return (*found, *grads)

    assert equal(run("auto"), run("reference"))
