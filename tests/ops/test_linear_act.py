"""What holds for linear_act and the products under it beyond single samples: exactness of the
activations, independence of rows, addressing, saved memory, and that no weight is ever stale."""

from __future__ import annotations

import copy
import gc
import itertools

import pytest
import torch
import torch.nn.functional as F
from timm.layers import GluMlp, SwiGLU

from vitfast.engine.products.linear import apply_gemm, prepare_gemm
from vitfast.ops import linear_act
from vitfast.ops.common import gemm
from vitfast.ops.linear_act import vendor
from vitfast.ops.linear_act.reference import ACTIVATIONS, Call
from vitfast.runtime import native
from vitfast.settings import settings
from vitfast.testing.errors import assert_close

DTYPES = [torch.float32, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
each_act = pytest.mark.parametrize("act", ACTIVATIONS)
pytestmark = pytest.mark.usefixtures("needs_native")

SMOOTH = [a for a in ACTIVATIONS if a != "none"]


def make(*shape, dtype=torch.float32, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g) * scale).to(dtype)


def run_gemm(x, weight, bias=None, act="none", **options):
    """residual + gamma * act(x W^T + bias), prepared and run at once, without autograd."""
    gates = {n: options.pop(n) for n in ("gate", "gate_weight", "gate_bias") if n in options}
    rows = x.numel() // weight.shape[1] if weight.shape[1] else 0
    return apply_gemm(prepare_gemm(weight, bias, rows, x.dtype, **gates), x, act, **options)


def through(act, z):
    """The kernel's activation of these numbers: products with 1 are exact."""
    return linear_act(z[:, None], torch.ones(1, 1), None, act, backend="cpu")[:, 0]


# ---- activations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("act", SMOOTH)
def test_activations_are_right_everywhere(act):
    z = torch.cat((torch.linspace(-40, 40, 200_003), make(50_000), make(1000, scale=1e-30)))
    exact = ACTIVATIONS[act](z.double())
    error = (through(act, z).double() - exact).abs()
    # Relative to the value, down to where float32 has no normal numbers. Far out the value is an
    # exponential, whose argument carries a rounding of its own. Both gelus round 1 + erf or
    # 1 + tanh in float64, and are no reference below -5.
    exponent = (exact / z).abs().log().nan_to_num(0, 0, 0).abs()
    limit = (1e-6 + 1.5e-7 * exponent) * exact.abs() + 1e-37
    if act.startswith("gelu"):
        limit[z < -5] += 2e-6
    assert (error <= limit).all()


@pytest.mark.parametrize("act", SMOOTH)
def test_gradients_of_activations_are_right_everywhere(act):
    z = torch.cat((torch.linspace(-40, 40, 200_003), make(50_000)))
    leaf = z.clone().requires_grad_()
    through(act, leaf).backward(torch.ones_like(z))
    wide = z.double().requires_grad_()
    ACTIVATIONS[act](wide).backward(torch.ones_like(wide))
    error = (leaf.grad.double() - wide.grad).abs()
    assert (error <= 5e-7 * (1 + wide.grad.abs())).all()


@each_act
def test_what_is_not_finite_stays_what_it_is(act):
    inf, nan = float("inf"), float("nan")
    z = torch.tensor([inf, -inf, nan, 3e38, -3e38, 1e30, -1e30, 1e-45, -1e-45, 0.0, -0.0])
    got, exact = through(act, z), ACTIVATIONS[act](z.double()).float()
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(test(got), test(exact)), (act, got, exact)
    finite = exact.isfinite()
    torch.testing.assert_close(got[finite], exact[finite], rtol=2e-6, atol=1e-44)
    leaf = z.clone().requires_grad_()
    through(act, leaf).backward(torch.ones_like(z))
    assert leaf.grad[3:].isfinite().all()
    assert leaf.grad[2].isnan() or act in ("none", "relu")


# ---- rows, layouts, neighbours -------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("act", ["none", "gelu"])
def test_a_row_has_the_same_bits_in_any_company(dtype, act):
    """One row, a tile of them, blocks, and so many that the weight is put in order beforehand."""
    x = make(1200, 201, dtype=dtype)
    weight, bias = make(70, 201, dtype=dtype, seed=1, scale=0.1), make(70, dtype=dtype, seed=2)
    whole = linear_act(x, weight, bias, act, backend="cpu")
    for rows in (1, 2, 13, 14, 15, 97, 300):
        part = linear_act(x[7 : 7 + rows], weight, bias, act, backend="cpu")
        assert torch.equal(part, whole[7 : 7 + rows])
    torch.set_num_threads(1)
    assert torch.equal(linear_act(x, weight, bias, act, backend="cpu"), whole)


@each_dtype
@pytest.mark.parametrize("k", [8, 33, 257, 300])
def test_nan_next_to_a_row_stays_out(dtype, k):
    """Odd widths end in half a pair, whose other half is another row's, or nobody's."""
    wide = torch.full((9, k + 3), float("nan"), dtype=dtype)
    wide[:, :k] = make(9, k, dtype=dtype)
    weight = make(5, k, dtype=dtype, seed=1)
    want = linear_act(wide[:, :k].clone(), weight, backend="cpu")
    assert want.isfinite().all()
    assert torch.equal(linear_act(wide[:, :k], weight, backend="cpu"), want)


@each_dtype
def test_nan_spreads_as_far_as_it_must(dtype):
    x, weight = make(40, 50, dtype=dtype), make(60, 50, dtype=dtype, seed=1)
    x[11, 49] = float("nan")
    weight[33, 0] = float("inf")
    y = linear_act(x, weight, backend="cpu")
    assert y[11].isnan().all() and y[:, 33].isfinite().logical_not().all()
    y[11], y[:, 33] = 0, 0
    assert y.isfinite().all()


@each_dtype
def test_any_strides_of_any_rank(dtype):
    weight = make(18, 20, dtype=dtype, seed=1)
    base = make(4, 6, 5, 20, dtype=dtype)
    for order in itertools.permutations(range(3)):
        x = base.permute(*order, 3)
        for view in (x, x[1:], x[:, ::2], x[:, :, 0], x[..., :1, :].expand(-1, -1, 7, -1)):
            want = linear_act(view.contiguous(), weight, backend="cpu")
            assert torch.equal(linear_act(view, weight, backend="cpu"), want)


@each_dtype
def test_many_short_groups_of_rows(dtype):
    """A token of each of many images: groups lower than a tile."""
    x, weight = make(300, 4, 64, dtype=dtype), make(48, 64, dtype=dtype, seed=1)
    want = linear_act(x[:, 1:3].contiguous(), weight, backend="cpu")
    assert torch.equal(linear_act(x[:, 1:3], weight, backend="cpu"), want)


# ---- the gated forms are timm's ------------------------------------------------------------------


@pytest.mark.parametrize("gate_last", [True, False])
@pytest.mark.parametrize("act", [torch.nn.SiLU, torch.nn.Sigmoid, torch.nn.GELU])
def test_packed_gates_are_timms(gate_last, act):
    torch.manual_seed(0)
    mlp = GluMlp(12, 20, act_layer=act, gate_last=gate_last)
    x, fc1 = make(3, 7, 12), mlp.fc1
    gate = "last" if gate_last else "first"
    hidden = linear_act(x, fc1.weight, fc1.bias, act.__name__.lower(), gate=gate, backend="cpu")
    torch.testing.assert_close(mlp.fc2(hidden), mlp(x))


def test_gates_with_a_weight_of_their_own_are_timms():
    torch.manual_seed(0)
    mlp, x = SwiGLU(12, 21), make(3, 7, 12)
    hidden = linear_act(
        x,
        mlp.fc1_x.weight,
        mlp.fc1_x.bias,
        "silu",
        gate_weight=mlp.fc1_g.weight,
        gate_bias=mlp.fc1_g.bias,
        backend="cpu",
    )
    torch.testing.assert_close(mlp.fc2(hidden), mlp(x))


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "widths"),
    [({}, []), ({"act": "gelu"}, [24]), ({"act": "silu", "gate": "first"}, [24])],
    ids=["linear", "gelu", "gated"],
)
def test_only_the_sums_before_the_activation_are_saved(options, widths):
    x, weight, bias = make(9, 16).requires_grad_(), make(24, 16), make(24)
    weight.requires_grad_()
    bias.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_act(x, weight, bias, backend="cpu", **options)
    inputs = {t.data_ptr() for t in (x, weight, bias)}
    extra = [t for t in saved if t is not None and t.numel() and t.data_ptr() not in inputs]
    assert [t.shape for t in extra] == [(9, w) for w in widths]


def test_float32_weights_under_autocast_get_unrounded_gradients():
    x, weight = make(64, 32), make(16, 32, seed=1, scale=0.2).requires_grad_()
    grad = make(64, 16, seed=2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = linear_act(x, weight, backend="cpu")
    y.backward(grad)
    assert y.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    exact = grad.double().T @ x.bfloat16().double()
    assert (weight.grad - exact).abs().max() < 1e-4  # rounded to bfloat16 it would be 1e-2


@each_dtype
def test_gradients_over_more_rows_than_are_packed_at_once(dtype):
    x, weight = make(9000, 6, dtype=dtype), make(5, 6, dtype=dtype, seed=1).requires_grad_()
    grad = make(9000, 5, dtype=dtype, seed=2)
    linear_act(x, weight, backend="cpu").backward(grad)
    exact = grad.double().T @ x.double()
    assert (weight.grad - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


# ---- the inference path of layers ----------------------------------------------------------------


@each_dtype
def test_apply_adds_the_scaled_branch_to_the_residual(dtype):
    x, weight, bias = make(2, 30, 40, dtype=dtype), make(50, 40, dtype=dtype), make(50)
    gamma, stream = make(50, seed=1), make(2, 30, 50, seed=2)
    layer = prepare_gemm(weight, bias, 60, dtype)
    got = apply_gemm(layer, x, "gelu", residual=stream, gamma=gamma)
    z = F.linear(x.double(), weight.double(), bias.double())
    want = stream.double() + gamma.double() * F.gelu(z)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    # In place, a chunk of rows after the other, out of and into parts of larger tensors.
    apply_gemm(layer, x[:, :13], "gelu", residual=stream[:, :13], gamma=gamma, out=stream[:, :13])
    apply_gemm(layer, x[:, 13:], "gelu", residual=stream[:, 13:], gamma=gamma, out=stream[:, 13:])
    assert torch.equal(stream, got)
    assert apply_gemm(layer, x, residual=stream, out_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert apply_gemm(layer, x).dtype == dtype


@pytest.mark.parametrize("how", ["by_setting", "disabled", "float64"])
def test_where_the_kernel_may_not_run_the_op_does(how, monkeypatch):
    dtype = torch.float64 if how == "float64" else torch.float32
    x, weight, bias = (make(*s, dtype=dtype) for s in ((3, 9, 8), (10, 8), (10,)))
    stream, gamma = make(3, 9, 10, dtype=dtype), make(10, dtype=dtype)
    if how == "by_setting":
        settings.backend = "reference"
    if how == "disabled":
        settings.disable = True

    def never(*args):
        raise AssertionError("the native kernel ran")

    monkeypatch.setattr(gemm, "product", never)
    got = run_gemm(x, weight, bias, "silu", residual=stream, gamma=gamma)
    assert torch.equal(got, stream + gamma * F.silu(F.linear(x, weight, bias)))


@each_dtype
def test_empty_inputs(dtype):
    weight = make(6, 4, dtype=dtype)
    assert run_gemm(make(0, 4, dtype=dtype), weight).shape == (0, 6)
    assert linear_act(make(3, 0, 4, dtype=dtype), weight).shape == (3, 0, 6)
    assert linear_act(make(3, 4, dtype=dtype), weight[:0]).shape == (3, 0)
    none = linear_act(make(3, 0, dtype=dtype), make(5, 0, dtype=dtype), make(5, dtype=dtype))
    assert torch.equal(none, make(5, dtype=dtype).expand(3, 5))


# ---- a weight is never stale ---------------------------------------------------------------------

EDITS = {
    "one_element": lambda p: p.__setitem__((3, 5), 9.0),
    "one_row": lambda p: p[4].fill_(0.5),
    "copy_": lambda p: p.copy_(make(24, 40, seed=7)),
    "lerp_": lambda p: p.lerp_(make(24, 40, seed=7), 0.3),
    "data_one_element": lambda p: p.data.__setitem__((0, 39), 9.0),
    "data_mul_": lambda p: p.data.mul_(1.5),
    "data_clamp_": lambda p: p.data.clamp_(-0.5, 0.5),
    "data_replaced": lambda p: setattr(p, "data", make(24, 40, seed=7)),
    "data_transposed": lambda p: setattr(p, "data", make(40, 24, seed=7).T),
    "through_numpy": lambda p: p.detach().numpy().__imul__(2),
    "optimizer": lambda p: step(p),
}


def step(p):
    p.grad = make(24, 40, seed=8)
    torch.optim.AdamW([p], lr=0.1).step()


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("run", [run_gemm, linear_act], ids=["direct", "op"])
def test_every_edit_of_a_weight_is_seen(edit, run):
    p, x = torch.nn.Parameter(make(24, 40)), make(9, 40, seed=1)
    for change in (lambda p: None, EDITS[edit], lambda p: None):
        with torch.no_grad():
            change(p)
            torch.testing.assert_close(run(x, p), F.linear(x, p))


def test_modules_that_change_are_seen():
    torch.manual_seed(0)
    model, x = torch.nn.Linear(40, 24), make(9, 40, seed=1)

    def current(model, x):
        with torch.no_grad():
            got = run_gemm(x, model.weight, model.bias)
            want = F.linear(x, model.weight, model.bias)
            torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)

    current(model, x)
    twin = copy.deepcopy(model)
    model.load_state_dict(torch.nn.Linear(40, 24).state_dict())
    current(model, x)
    current(twin, x)
    current(model.bfloat16(), x.bfloat16())
    with torch.inference_mode():
        frozen = torch.nn.Linear(40, 24)
        current(frozen, x)
        frozen.weight.mul_(2)
        current(frozen, x)
    for seed in range(20):  # one freed, another at its address
        weight = make(24, 40, seed=seed)
        torch.testing.assert_close(run_gemm(x, weight), F.linear(x, weight))
        del weight
        gc.collect()


# ---- oneDNN --------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_onednn_forward_saves_what_its_backward_takes(act):
    """Each backend's saved sums serve the other's backward: they mean the same."""
    if vendor.available():
        pytest.skip("; ".join(vendor.available()))
    x, weight, bias = make(6, 10), make(8, 10, seed=1), make(8, seed=2)
    grads = []
    for backend in ("cpu", "vendor"):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = linear_act(*leaves, act, gate="last", backend=backend)
        y.backward(make(6, 4, seed=3))
        grads.append([y, *(t.grad for t in leaves)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("k", [192, 240, 256, 384, 768, 3072])
def test_onednn_sums_as_exactly_as_pytorch(k):
    """Widths about the length at which its sums are cut."""
    if vendor.available():
        pytest.skip("; ".join(vendor.available()))
    x, weight = make(197, k), make(256, k, seed=1) * k**-0.5
    exact = F.linear(x.double(), weight.double())
    assert_close(linear_act(x, weight, backend="vendor"), exact, F.linear(x, weight))


def test_a_missing_onednn_is_a_reason(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert vendor.available() == ["this PyTorch was built without oneDNN"]
    why = vendor.can_run(Call.of(make(2, 3), make(4, 3)))
    assert "this PyTorch was built without oneDNN" in why


def test_the_kernel_gives_its_reasons():
    x, weight = make(2, 3, dtype=torch.float64), make(4, 3, dtype=torch.float64)
    assert any("float64 is not implemented" in r for r in gemm.reasons(x, weight))
    assert any("meta" in r for r in gemm.reasons(x.float().to("meta")))
    assert gemm.reasons(x.float()) == [] and native.reasons() == []
