"""What holds for attention whatever the numbers: symmetries, exactness, memory, timm's formula.

The generic tests compare every sample with float64; these need no reference, or timm's.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from vitfast.errors import BackendUnavailableError
from vitfast.ops import attention, spec_of
from vitfast.ops.attention.native import forward_direct
from vitfast.runtime import native
from vitfast.settings import ISA_LEVELS, settings
from vitfast.testing.cases import Case
from vitfast.testing.errors import raise_if_wrong

DTYPES = [torch.float32, torch.bfloat16]
DTYPE_IDS = ["float32", "bfloat16"]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
pytestmark = pytest.mark.usefixtures("needs_native")

# Several tiles of keys, the last of them and the head dim not full.
B, N, H, D = 2, 83, 3, 24


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def qkv(dtype):
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(B, N, H, D, generator=g).to(dtype) for _ in range(3))


def gradients(*tensors, weigh=1.0, **options):
    """Gradients of the three inputs for one fixed output gradient."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = attention(*leaves, backend="cpu", **options)
    g = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=g).to(out.dtype)
    return torch.autograd.grad(out, leaves, grad * weigh)


def close(actual, expected):
    """Within a few roundings of the largest value."""
    largest = float(expected.abs().max())
    limit = 8 * torch.finfo(expected.dtype).eps * largest
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit)


# ---- many tiles of keys -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "vendor"])
def test_early_keys_count_as_much_as_late_ones(backend):
    """Among 20,000 equal keys: an error of the running maximum would grow with every tile."""
    n, d = 20_000, 16
    for seed in range(4):  # roundings differ with the logit
        q, key = torch.randn(2, 1, 1, 1, d, generator=torch.Generator().manual_seed(seed))
        k = key.expand(1, n, 1, d).contiguous()
        v = torch.zeros(1, n, 1, d)
        v[:, : n // 2] = 1
        out = attention(q, k, v, backend=backend)
        torch.testing.assert_close(out, torch.full_like(out, 0.5), rtol=0, atol=1e-6)


def test_backward_and_forward_agree_on_the_weights():
    """The gradients of v are the weights, and their sum over the keys is 1."""
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 5000, 1, 16)
    v = torch.zeros(1, 5000, 1, 16, requires_grad=True)
    out = attention(q, k, v, backend="cpu")
    (weights,) = torch.autograd.grad(out, v, torch.ones_like(out))
    assert abs(float(weights[..., 0].double().sum()) - 1) < 5e-7


# ---- symmetries ----------------------------------------------------------------------------------


@each_dtype
def test_order_of_keys_does_not_matter(qkv):
    q, k, v = qkv
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    close(attention(q, k[:, order], v[:, order], backend="cpu"), attention(q, k, v, backend="cpu"))


@each_dtype
def test_queries_are_independent_to_the_bit(qkv):
    q, k, v = qkv
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    want = attention(q, k, v, backend="cpu")
    assert torch.equal(attention(q[:, order], k, v, backend="cpu"), want[:, order])
    assert torch.equal(attention(q[:, 5:6], k, v, backend="cpu"), want[:, 5:6])


@each_dtype
@pytest.mark.parametrize("causal", [False, True])
def test_images_and_heads_are_independent_to_the_bit(qkv, causal):
    options = {"is_causal": causal, "backend": "cpu"}
    whole, grads = attention(*qkv, **options), gradients(*qkv, is_causal=causal)
    for b in range(B):
        assert torch.equal(attention(*(t[b : b + 1] for t in qkv), **options), whole[b : b + 1])
    for h in range(H):
        one = slice(h, h + 1)
        assert torch.equal(attention(*(t[:, :, one] for t in qkv), **options), whole[:, :, one])
    leaves = [t[:1].clone().requires_grad_() for t in qkv]
    out = attention(*leaves, **options)
    grad = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    for part, all_of_it in zip(torch.autograd.grad(out, leaves, grad[:1]), grads, strict=True):
        assert torch.equal(part, all_of_it[:1])


@each_dtype
def test_powers_of_two_move_between_q_and_scale(qkv):
    q, k, v = qkv
    want = attention(q, k, v, scale=0.25, backend="cpu")
    assert torch.equal(attention(q * 2, k, v, scale=0.125, backend="cpu"), want)
    assert torch.equal(attention(-q, k, v, scale=-0.25, backend="cpu"), want)


@each_dtype
def test_a_constant_on_a_row_of_logits_changes_nothing(qkv):
    shift = torch.linspace(-3, 3, N)[:, None].expand(N, N)
    want = attention(*qkv, mask=torch.zeros(N, N), backend="cpu")
    close(attention(*qkv, mask=shift, backend="cpu"), want)


@each_dtype
def test_constant_values_come_out(qkv):
    q, k, v = qkv
    constant = v[:1, :1].expand_as(v)
    close(attention(q, k, constant, backend="cpu"), constant)


@each_dtype
def test_one_key_gets_all_the_weight(qkv):
    q, k, v = qkv
    k, v = k[:, :1], v[:, :1]
    close(attention(q, k, v, backend="cpu"), v.expand_as(q))
    dq, dk, dv = gradients(q, k, v)
    limit = 64 * torch.finfo(q.dtype).eps
    assert dq.abs().max() < limit and dk.abs().max() < N * limit
    assert dv.abs().max() > 1


@each_dtype
def test_scale_0_averages(qkv):
    q, k, v = qkv
    mean = v.float().mean(1, keepdim=True).to(v.dtype).expand_as(v)
    close(attention(q, k, v, scale=0.0, backend="cpu"), mean)
    dq, dk, _ = gradients(q, k, v, scale=0.0)
    assert not dq.any() and not dk.any()


@each_dtype
def test_gradients_are_linear_in_the_output_gradient(qkv):
    for once, twice in zip(gradients(*qkv), gradients(*qkv, weigh=2.0), strict=True):
        assert torch.equal(2 * once, twice)


@each_dtype
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masked_keys_and_values_leave_no_trace(qkv, kind):
    q, k, v = qkv
    mask = torch.arange(N) < N - 20
    if kind == "float":
        mask = torch.zeros(N).masked_fill(~mask, float("-inf"))
    want = attention(q, k, v, mask=mask, backend="cpu")
    close(want, attention(q, k[:, : N - 20], v[:, : N - 20], backend="cpu"))
    garbage = [t.clone() for t in (k, v)]
    for t in garbage:
        t[:, N - 20 :] = 1e4
    assert torch.equal(attention(q, *garbage, mask=mask, backend="cpu"), want)
    _, dk, dv = gradients(q, *garbage, mask=mask)
    assert not dk[:, N - 20 :].any() and not dv[:, N - 20 :].any()


@each_dtype
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("first", [0, 70])
def test_queries_that_see_no_key_give_0_and_no_gradient(qkv, kind, first):
    mask = torch.ones(N, N, dtype=torch.bool)
    mask[first : first + 5] = False
    if kind == "float":
        mask = torch.zeros(N, N).masked_fill(~mask, float("-inf"))
    blind = slice(first, first + 5)
    out = attention(*qkv, mask=mask, backend="cpu")
    assert not out[:, blind].any() and out.isfinite().all()
    dq, dk, dv = gradients(*qkv, mask=mask)
    assert not dq[:, blind].any()
    assert all(t.isfinite().all() and t.any() for t in (dq, dk, dv))
    nothing = torch.zeros(N, N, dtype=torch.bool)
    assert not any(t.any() for t in gradients(*qkv, mask=nothing))


@each_dtype
def test_a_row_of_the_lowest_number_averages(qkv):
    """NaFlexViT marks padding by finfo.min, which drowns the scores but is not -inf."""
    q, k, v = qkv
    mask = torch.zeros(N, N, dtype=q.dtype)
    mask[60:] = torch.finfo(q.dtype).min
    mean = v.float().mean(1, keepdim=True).to(v.dtype).expand_as(v)
    close(attention(q, k, v, mask=mask, backend="cpu")[:, 60:], mean[:, 60:])
    leaf = v.clone().requires_grad_()
    out = attention(q, k, leaf, mask=mask, backend="cpu")
    out[:, 70].sum().backward()
    close(leaf.grad, torch.full_like(v, 1 / N))


@each_dtype
def test_causal_is_the_triangular_mask(qkv):
    triangle = torch.ones(N, N, dtype=torch.bool).tril()
    want = attention(*qkv, mask=triangle, backend="cpu")
    close(attention(*qkv, is_causal=True, backend="cpu"), want)


# ---- one kernel behind every entrance ------------------------------------------------------------


@each_dtype
def test_packed_is_separate_to_the_bit(qkv):
    packed = torch.stack(qkv, 2).requires_grad_()
    out = attention(packed, backend="cpu")
    assert torch.equal(out, attention(*qkv, backend="cpu"))
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    (dpacked,) = torch.autograd.grad(out, packed, grad)
    assert dpacked.is_contiguous()
    assert torch.equal(dpacked, torch.stack(gradients(*qkv), 2))


@each_dtype
def test_the_direct_entrance_is_the_op_to_the_bit(qkv):
    q, k, v = qkv
    options = {"qk_norm": "rms", "q_norm_weight": torch.rand(D), "rope_prefix": 2,
               "rope": torch.randn(H, N - 2, 2 * D), "bias": torch.randn(H, N, N)}  # fmt: skip
    want = attention(q, k, v, scale=0.2, backend="cpu", **options)
    assert torch.equal(forward_direct(q, k, v, scale=0.2, **options), want)
    out = torch.full((B, H, N, D + 8), float("nan"), dtype=q.dtype).transpose(1, 2)
    view = out[..., :D]
    assert forward_direct(q, k, v, scale=0.2, out=view, **options) is view
    assert torch.equal(view, want) and out[..., D:].isnan().all()


@each_dtype
def test_one_and_two_threads_give_the_same_bits(dtype):
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 700, 3, 32, generator=g).to(dtype) for _ in range(3))
    bias = torch.randn(3, 700, 700, generator=g).to(dtype)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = attention(q, k, v, bias=bias, backend="cpu")
        results.append((out, *gradients(q, k, v, bias=bias)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


SAMPLES = ("head_dim_72", "tokens_65", "norm_rms_rope_half_bias_mask", "blind_queries_float")


@each_dtype
@pytest.mark.parametrize("level", ISA_LEVELS)
@pytest.mark.parametrize("name", SAMPLES)
def test_every_instruction_set_is_right(dtype, level, name):
    if ISA_LEVELS.index(level) > native.native().best_isa():
        pytest.skip(f"this CPU has no {level}")
    settings.cpu_isa = level
    spec = spec_of("attention")
    case = Case(spec, next(s for s in spec.samples if s.name == name), dtype)
    raise_if_wrong(case.judge(case.call.run(spec.public, backend="cpu")))
    raise_if_wrong(case.judge_gradients(case.gradients(case.trained, backend="cpu")))
    assert native.isa() == level


def test_a_backward_without_saved_statistics_recomputes():
    """The backend may change between forward and backward; gradients stay right."""
    packed = torch.randn(2, 9, 3, 2, 8, requires_grad=True)
    out = attention(packed, backend="auto")
    (want,) = torch.autograd.grad(out.square().sum(), packed)
    settings.backend = "vendor"
    out = attention(packed)
    settings.backend = "cpu"
    (got,) = torch.autograd.grad(out.square().sum(), packed)
    close(got, want)


@pytest.mark.parametrize("name", ["mask", "rope"])
def test_gradients_that_only_others_have(name):
    """The kernels decline, and a backend that has the gradient serves the call."""
    options = {"mask": torch.randn(2, 1, 9, 9), "rope": torch.randn(2, 9, 16)}
    packed = torch.randn(2, 9, 3, 2, 8)

    def gradient(backend, dtype):
        given = {n: t.detach().to(dtype).requires_grad_(n == name) for n, t in options.items()}
        attention(packed.to(dtype), **given, backend=backend).square().sum().backward()
        return given[name].grad

    with pytest.raises(BackendUnavailableError, match=f"{name} requires grad"):
        gradient("cpu", torch.float32)
    want = gradient("reference", torch.float64).float()
    torch.testing.assert_close(gradient("auto", torch.float32), want, rtol=1e-4, atol=1e-4)


def test_the_binding_refuses_nonsense():
    good = forward_arguments()
    native.native().attention_forward(*good)
    for place, value in (
        ((0, 0), 2),  # float16
        ((0, 1), (1, 2, 9, 9, 257)),  # head dim
        ((0, 1), (1, 2, 0, 9, 8)),  # no queries
        ((0, 4), (0, 144, 16, 8, 1)),  # null q
        ((0, 4), (good[0][4][0], 144, -16, 8, 1)),  # negative stride
        ((1,), (3, 1e-6, (0, 0, 0, 0), 0, (0, 0, 0), 0, False)),  # unknown norm
        ((1,), (0, 1e-6, (0, 0, 0, 0), 64, (0, 0, 0), 10, False)),  # prefix beyond the tokens
        ((4,), 0),  # threads
    ):
        bad = list(good)
        if len(place) == 2:
            bad[0] = tuple(value if i == place[1] else x for i, x in enumerate(good[0]))
        else:
            bad[place[0]] = value
        with pytest.raises(ValueError, match="attention"):
            native.native().attention_forward(*bad)


def forward_arguments(memory=torch.zeros(4, 1, 9, 2, 8)):  # noqa: B008 - kept alive on purpose
    q, k, v, out = ((t.data_ptr(), *t.stride()) for t in memory)
    return [(0, (1, 2, 9, 9, 8), 1.0, False, q, k, v, None, None), None, out, 0, 1]


# ---- memory --------------------------------------------------------------------------------------


def test_no_buffer_of_queries_by_keys():
    """At N = 12,288 one float32 head's scores alone would take 576 MiB."""
    program = """
        import resource, torch
        from vitfast.ops import attention
        torch.set_num_threads(2)
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        def run(n):
            packed = torch.randn(1, n, 3, 1, 8, requires_grad=True)
            rope = torch.randn(n, 16)
            attention(packed, rope=rope, backend="cpu").sum().backward()
        run(64)
        before = peak()
        run(12288)
        print(peak() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 64


# ---- timm ----------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "vendor", "reference"])
def test_timm_attention_rope(dtype, half, backend):
    """q/k norm, rotation with prefix tokens and attention as in timm's own module."""
    from timm.layers import AttentionRope, LayerNorm

    module = AttentionRope(
        48, 2, qk_norm=True, norm_layer=LayerNorm, num_prefix_tokens=3, rotate_half=half
    ).to(dtype)
    module.proj = torch.nn.Identity()
    for norm in (module.q_norm, module.k_norm):
        torch.nn.init.normal_(norm.weight, 1, 0.2)
        torch.nn.init.normal_(norm.bias, 0, 0.2)
    x, rope = torch.randn(2, 20, 48, dtype=dtype), torch.randn(17, 48)
    mask = torch.rand(2, 1, 1, 20) < 0.8
    with torch.no_grad():
        want = module(x, rope=rope, attn_mask=mask)
        got = attention(
            module.qkv(x).view(2, 20, 3, 2, 24),
            mask=mask,
            qk_norm="layer",
            q_norm_weight=module.q_norm.weight,
            q_norm_bias=module.q_norm.bias,
            k_norm_weight=module.k_norm.weight,
            k_norm_bias=module.k_norm.bias,
            qk_norm_eps=module.q_norm.eps,
            rope=rope,
            rope_prefix=3,
            rope_half=half,
            backend=backend,
        )
    close(got.flatten(2), want)


@pytest.mark.parametrize("backend", ["cpu", "vendor", "reference"])
def test_autocast_treats_masks_as_sdpa_does(backend):
    """torch casts float masks too, so that float32's lowest number becomes -inf."""
    q, k, v = (torch.randn(2, 9, 2, 8) for _ in range(3))
    mask = torch.randn(9, 9)
    mask[3] = torch.finfo(torch.float32).min
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        heads_first = [t.transpose(1, 2) for t in (q, k, v)]
        want = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask)
        got = attention(q, k, v, mask=mask, backend=backend)
    assert got.dtype == torch.bfloat16 and not got[:, 3].any()
    close(got, want.transpose(1, 2))


def test_gradients_inside_autocast_keep_float32_products():
    """backward() within the autocast region must not lower what the forward had cast already."""
    x = torch.randn(2, 9, 3, 2, 8)
    grads = []
    for inside in (True, False):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = attention(leaf, backend="reference").float().square().sum()
            if inside:
                out.backward()
        if not inside:
            out.backward()
        grads.append(leaf.grad)
    assert grads[0].dtype == torch.float32
    assert torch.equal(*grads)
