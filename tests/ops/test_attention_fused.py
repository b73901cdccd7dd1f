"""torch's fused attention kernels behind the vendor's backend: which runs, with what, how often.

The kernels of GPUs cannot run here. They are stood in for by functions registered for the CPU under
their own names in aten, so that torch's dispatcher checks every argument against its schema, and
which refuse what the kernels refuse; shapes are checked with fake CUDA tensors besides.
"""

from __future__ import annotations

import math
import sys
import types
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from vitfast.ops import attention
from vitfast.ops.attention import fused, reference, vendor
from vitfast.ops.attention.reference import Call
from vitfast.settings import settings

B, N, H, D = 2, 37, 3, 20
GPU_KERNELS = ("flash", "efficient", "cudnn")


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def call_of(packed, **options):
    given = dict.fromkeys(Call._fields) | {
        "is_causal": False, "scale": packed.shape[-1] ** -0.5, "qk_norm": "", "qk_norm_eps": 1e-6,
        "rope_prefix": 0, "rope_half": False, "save_stats": True, "mask_grad": False,
        "bias_grad": False, "rope_grad": False,
    }  # fmt: skip
    return Call(**given | {"q": packed} | options)


def scores_of(q, k, mask, is_causal, scale):
    scores = q @ k.mT * scale
    if is_causal:
        scores = scores.masked_fill(~reference.causal_keep(q, k), float("-inf"))
    return scores if mask is None else scores + mask


def stand_in(q, k, v, mask, is_causal, scale):
    """A forward that lays its result out as the kernels do, 0 for a query that sees no key."""
    scores = scores_of(q, k, mask, is_causal, scale)
    lse = scores.logsumexp(-1)
    out = scores.softmax(-1).nan_to_num(0) @ v
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.masked_fill(lse.isneginf(), 0)


def stand_in_backward(grad, q, k, v, mask, out, lse, is_causal, scale):
    """From the log-sum-exp and the output, as flash attention does (Dao et al. 2022)."""
    p = (scores_of(q, k, mask, is_causal, scale) - lse[..., None]).exp()
    ds = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))
    return ds @ k * scale, ds.mT @ q * scale, p.mT @ grad, ds


@pytest.fixture
def gpu_kernels():
    """Stand-ins for the kernels of GPUs, on the CPU; gives how often each ran."""
    ran = Counter()
    library = torch.library.Library("aten", "IMPL")

    def register(name):
        def add(function):
            library.impl(name, function, "CPU")
            return function

        return add

    def seed(q, *shape):
        return q.new_empty(shape, dtype=torch.int64)

    @register("_scaled_dot_product_flash_attention")
    def flash(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *,
              scale=None):  # fmt: skip
        ran["flash"] += 1
        assert query.shape[-1] % 8 == 0 and dropout_p == 0.0 and not return_debug_mask
        out, lse = stand_in(query, key, value, None, is_causal, scale)
        none = seed(query)
        return out, lse, none, none, query.shape[2], key.shape[2], none, none, none

    @register("_scaled_dot_product_flash_attention_backward")
    def flash_backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q,
                       max_k, dropout_p, is_causal, philox_seed, philox_offset, *,
                       scale=None):  # fmt: skip
        ran["flash backward"] += 1
        assert all(t.shape[-1] % 8 == 0 for t in (grad_out, query, key, value, out))
        assert cum_seq_q is None and cum_seq_k is None
        assert (max_q, max_k) == (query.shape[2], key.shape[2])
        assert logsumexp.shape == query.shape[:3] and logsumexp.is_contiguous()
        assert philox_seed.dtype == torch.uint64 and philox_seed.shape == (2,)
        return stand_in_backward(
            grad_out, query, key, value, None, out, logsumexp, is_causal, scale
        )[:3]

    def check_bias(attn_bias, query, key):
        if attn_bias is not None:
            assert attn_bias.dtype == query.dtype
            assert attn_bias.shape == (*query.shape[:3], key.shape[2])
            assert attn_bias.stride(-1) == 1 and not any(s % 8 for s in attn_bias.stride()[:3])

    @register("_scaled_dot_product_efficient_attention")
    def efficient(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False,
                  *, scale=None):  # fmt: skip
        ran["efficient"] += 1
        check_bias(attn_bias, query, key)
        assert compute_log_sumexp
        out, lse = stand_in(query, key, value, attn_bias, is_causal, scale)
        lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
        return out, lse, seed(query), seed(query)

    @register("_scaled_dot_product_efficient_attention_backward")
    def efficient_backward(grad_out_, query, key, value, attn_bias, out, logsumexp, philox_seed,
                           philox_offset, dropout_p, grad_input_mask, is_causal=False, *,
                           scale=None):  # fmt: skip
        ran["efficient backward"] += 1
        check_bias(attn_bias, query, key)
        rows = query.shape[2]
        assert logsumexp.shape[2] % 32 == 0 and logsumexp.is_contiguous()
        assert logsumexp[..., rows:].isposinf().all()
        assert out.transpose(1, 2).is_contiguous()
        *grads, ds = stand_in_backward(
            grad_out_, query, key, value, attn_bias, out, logsumexp[..., :rows], is_causal, scale
        )
        return *grads, ds if grad_input_mask[3] else None

    @register("_scaled_dot_product_cudnn_attention")
    def cudnn(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False,
              return_debug_mask=False, *, scale=None):  # fmt: skip
        ran["cudnn"] += 1
        assert attn_bias is None and compute_log_sumexp
        out, lse = stand_in(query, key, value, None, is_causal, scale)
        none = seed(query)
        return out, lse[..., None], none, none, query.shape[2], key.shape[2], none, none, none

    @register("_scaled_dot_product_cudnn_attention_backward")
    def cudnn_backward(grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset,
                       attn_bias, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, *,
                       scale=None):  # fmt: skip
        ran["cudnn backward"] += 1
        assert cum_seq_q is None and attn_bias is None
        assert logsumexp.shape == (*query.shape[:3], 1) and logsumexp.is_contiguous()
        assert philox_seed.dtype == torch.int64 and philox_seed.shape == ()
        return stand_in_backward(
            grad_out, query, key, value, None, out, logsumexp[..., 0], is_causal, scale
        )[:3]

    yield ran
    library._destroy()


OPTIONS = {
    "plain": {},
    "causal": dict(is_causal=True),
    "norm_rope": dict(
        qk_norm="rms", q_norm_weight=1 + draw(D), k_norm_weight=1 + draw(D),
        rope=torch.cat([draw(N - 1, D).sin(), draw(N - 1, D).cos()], -1), rope_prefix=1,
    ),
    "mask": dict(mask=draw(B, 1, 1, N) > -1),
    "bias": dict(bias=draw(H, N, N)),
    "blind": dict(mask=torch.arange(N)[:, None].expand(N, N) > 3),
    "float_mask_and_bias": dict(mask=draw(B, 1, N, N), bias=draw(1, H, N, N)),
}  # fmt: skip
UNMASKED = ("plain", "causal", "norm_rope")


SERVED = [(name, o) for name in ("cpu", *GPU_KERNELS) for o in UNMASKED]
SERVED += [("efficient", o) for o in OPTIONS if o not in UNMASKED]
"""On a GPU only the efficient kernel is asked for calls with a mask or bias."""


@pytest.mark.parametrize(("name", "options"), SERVED)
def test_each_kernels_backward_follows_its_forward(gpu_kernels, monkeypatch, name, options):
    given = OPTIONS[options]
    trains = options in ("bias", "float_mask_and_bias")
    call = call_of(
        draw(B, N, 3, H, D), **given, bias_grad=trains, mask_grad=trains and "mask" in given
    )
    monkeypatch.setattr(fused, "choose", lambda problem: name)
    out, stats = vendor.forward(call)
    grad = draw(B, N, H, D)
    found = vendor.backward(grad, call, out, stats)
    assert gpu_kernels == ({} if name == "cpu" else {name: 1, f"{name} backward": 1})

    monkeypatch.undo()
    exact = call_of(**{
        n: t.double() if isinstance(t, torch.Tensor) and t.dtype != torch.bool else t
        for n, t in {"packed": call.q, **call._asdict()}.items() if n != "q"
    })  # fmt: skip
    torch.testing.assert_close(out.double(), reference.compute(exact), rtol=1e-4, atol=1e-5)
    wanted = reference.backward(grad.double(), exact)
    for what, got, want in zip(reference.INPUTS, found, wanted, strict=True):
        assert got.shape == want.shape and got.is_contiguous()
        limit = 1e-5 * float(want.abs().max()) if want.numel() else 0
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=limit, msg=what)


@pytest.mark.parametrize("name", ["cpu", *GPU_KERNELS])
def test_any_kernels_backward_follows_any_others_forward(gpu_kernels, monkeypatch, name):
    """As where `sdpa_kernel` is around the forward and not around the backward."""
    call, grad = call_of(draw(B, N, 3, H, D), is_causal=True), draw(B, N, H, D)
    (want, *_) = reference.backward(grad, call)
    for forward in ("cpu", *GPU_KERNELS, "math"):
        monkeypatch.setattr(fused, "choose", lambda problem, chosen=forward: chosen)
        out, stats = vendor.forward(call)
        monkeypatch.setattr(fused, "choose", lambda problem: name)
        (got, *_) = vendor.backward(grad, call, out, stats)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=forward)


@pytest.mark.parametrize("name", [*GPU_KERNELS, "cpu"])
def test_aten_has_the_kernels_as_they_are_called(name):
    assert fused.KERNELS[name].is_known()


def test_a_kernel_of_another_signature_is_left_to_autograd(monkeypatch):
    kernel = fused._OnCpu("_scaled_dot_product_efficient_attention")
    assert not kernel.is_known()
    assert not fused._OnCpu("_no_such_attention").is_known()
    monkeypatch.setitem(fused.KERNELS, "cpu", kernel)
    packed = draw(B, N, 3, H, D).requires_grad_()
    problem = vendor._problem(call_of(packed), *reference.prologue(call_of(packed)))
    assert fused.choose(problem) == ""
    for options in ({}, dict(bias=draw(H, N, N).requires_grad_())):
        leaves = [packed, *options.values()]
        results = [
            torch.autograd.grad(attention(packed, **options, backend=b).square().sum(), leaves)
            for b in ("vendor", "reference")
        ]
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dim", [64, 20])
@pytest.mark.parametrize("name", GPU_KERNELS)
def test_shapes_on_a_gpu(monkeypatch, name, dim):
    monkeypatch.setattr(fused, "choose", lambda problem: name)
    with FakeTensorMode(), vendor.forcing(name):
        packed = torch.empty(B, N, 3, H, dim, device="cuda", dtype=torch.bfloat16)
        call = call_of(packed)
        out, stats = vendor.forward(call)
        assert out.shape == (B, N, H, dim) and out.is_contiguous()
        assert stats.shape == (2, B, H, N) and stats.dtype == torch.float32
        grads = vendor.backward(torch.empty_like(out), call, out, stats)
        assert grads[0].shape == packed.shape and grads[0].dtype == packed.dtype
        assert {t.device for t in (out, stats, *grads)} == {packed.device}


def test_a_wider_mask_on_a_gpu_keeps_its_precision(monkeypatch):
    """q, k and v take its dtype on the way in, their gradients q's on the way out."""
    monkeypatch.setattr(fused, "choose", lambda problem: "efficient")
    with FakeTensorMode():
        packed = torch.empty(B, N, 3, H, D, device="cuda", dtype=torch.bfloat16)
        bias = torch.empty(H, N, N, device="cuda")
        call = call_of(packed, bias=bias, bias_grad=True)
        problem = vendor._problem(call, *reference.prologue(call))
        assert problem.q.dtype == problem.mask.dtype == torch.float32
        out, stats = vendor.forward(call)
        grads = dict(zip(reference.INPUTS, vendor.backward(out, call, out, stats), strict=True))
        assert out.dtype == grads["q"].dtype == torch.bfloat16
        assert grads["bias"].dtype == torch.float32 and grads["bias"].shape == bias.shape


# ---- statistics ----------------------------------------------------------------------------------


def test_statistics_of_another_backend_are_read_on_a_gpu_and_recognised_on_the_cpu():
    """Triton's are shifts, powers of two without a mask, and sums; see tests/interpreter too."""
    call, out = call_of(draw(B, N, 3, H, D)), draw(B, N, H, D)
    lse = draw(B, H, N)
    stats = vendor._stats_of(call, out, lse)
    assert torch.equal(vendor._lse_of(call, stats), lse) and stats[1, 0, 0, 0] < 0
    assert vendor._lse_of(call, vendor.no_stats(call, out)) is None
    assert vendor._lse_of(call, lse.new_ones(2, B, H, N)) is None
    masked = call._replace(mask=torch.ones(1, 1, 1, N, dtype=torch.bool))
    for sums, given, expected in (
        (float("nan"), call, lse), (2.0, call, (lse + 1) * math.log(2)),
        (2.0, masked, lse + math.log(2)), (0.0, masked, torch.full_like(lse, math.inf)),
    ):  # fmt: skip
        on_gpu = OnGpu(torch.stack([lse, torch.full_like(lse, sums)]))
        torch.testing.assert_close(vendor._lse_of(given, on_gpu), expected)


class OnGpu:
    """Statistics that say that they lie on a GPU."""

    device = torch.device("cuda")

    def __init__(self, stats):
        self.stats = stats

    def __getitem__(self, index):
        assert index in (0, 1), "reading a number would wait for the GPU"
        return self.stats[index]


@pytest.mark.parametrize("forward", ["cpu", "vendor", "reference"])
@pytest.mark.parametrize("backward", ["cpu", "vendor", "reference"])
@pytest.mark.usefixtures("needs_native")
def test_the_backward_may_run_on_another_backend(forward, backward):
    packed = draw(B, N, 3, H, D).requires_grad_()
    mask = torch.arange(N)[:, None].expand(N, N) > 3
    settings.backend = forward
    out = attention(packed, mask=mask)
    settings.backend = backward
    (got,) = torch.autograd.grad(out.square().sum(), packed)
    exact = packed.detach().double().requires_grad_()
    out = attention(exact, mask=mask, backend="reference")
    (want,) = torch.autograd.grad(out.square().sum(), exact)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


# ---- beside SDPA ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", ["plain", "causal", "mask", "blind"])
def test_gradients_are_sdpas_to_the_bit(dtype, options):
    results = []
    for run in ("ours", "sdpa"):
        packed = draw(B, N, 3, H, D, dtype=dtype).requires_grad_()
        if run == "ours":
            out = attention(packed, **OPTIONS[options], backend="vendor")
        else:
            given = OPTIONS[options]
            out = F.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in packed.unbind(2)),
                attn_mask=given.get("mask"), is_causal=given.get("is_causal", False),
            ).transpose(1, 2)  # fmt: skip
        out.backward(draw(B, N, H, D, dtype=dtype))
        results.append((out.detach(), packed.grad))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def events(function):
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        function()
    return Counter(e.name for e in seen.events())


@pytest.mark.parametrize("options", ["plain", "norm_rope", "mask"])
def test_the_forward_runs_once(options):
    packed = draw(B, N, 3, H, D).requires_grad_()
    name = "aten::_scaled_dot_product_flash_attention_for_cpu"

    def train():
        attention(packed, **OPTIONS[options], backend="vendor").sum().backward()

    found = events(train)
    assert (found[name], found[f"{name}_backward"]) == (1, 1)
    assert not found["aten::bmm"]


def test_without_a_fused_kernel_the_scores_are_made_again_and_nothing_else():
    """Two products forward; backward the scores', and one for each gradient and the weights'."""
    packed = draw(B, N, 3, H, D).requires_grad_()
    bias = draw(H, N, N).requires_grad_()

    def train(**options):
        attention(packed, **options).sum().backward()

    for backend in ("vendor", "reference"):
        assert events(lambda b=backend: train(bias=bias, backend=b))["aten::bmm"] == 7
    with sdpa_kernel(SDPBackend.MATH):
        assert events(lambda: train(backend="vendor"))["aten::bmm"] == 7


# ---- xformers ------------------------------------------------------------------------------------


def test_xformers_keeps_its_log_sum_exp(monkeypatch):
    """A module that takes and gives what xformers 0.0.2x's `ops` does, rows filled up to 32."""
    ran = []

    def heads_first(*tensors):
        return [t.transpose(1, 2) for t in tensors]

    def forward(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        ran.append("forward")
        out, lse = stand_in(*heads_first(query, key, value), None, False, scale)
        return out.transpose(1, 2), F.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))

    def backward(grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *,
                 op=None):  # fmt: skip
        ran.append("backward")
        assert lse.shape == (B, H, N) and output.shape == grad.shape == query.shape
        grad, output, q, k, v = heads_first(grad, output, query, key, value)
        found = stand_in_backward(grad, q, k, v, None, output, lse, False, scale)
        return tuple(heads_first(*found[:3]))

    module = types.ModuleType("xformers.ops")
    module.memory_efficient_attention_forward_requires_grad = forward
    module.memory_efficient_attention_backward = backward
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    monkeypatch.setattr(vendor, "kernel", lambda call: "xformers")
    call, grad = call_of(draw(B, N, 3, H, D)), draw(B, N, H, D)
    out, stats = vendor.forward(call)
    (got, *_) = vendor.backward(grad, call, out, stats)
    assert ran == ["forward", "backward"]
    (want, *_) = reference.backward(grad, call)
    torch.testing.assert_close(out, reference.compute(call), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
