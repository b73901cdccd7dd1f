"""varlen_attention: each sequence as if it were alone, and what each backend is asked for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from vitfast import ops
from vitfast.ops.attention import native as attention_native
from vitfast.ops.varlen_attention import native, reference, vendor
from vitfast.ops.varlen_attention.api import has_kernel
from vitfast.ops.varlen_attention.reference import INPUTS, Call
from vitfast.ops.varlen_attention.spec import cumulative
from vitfast.settings import settings
from vitfast.testing.errors import compare, same_bits

LENGTHS = [5, 0, 37, 37, 37, 1, 130, 2, 2]
DTYPES = [torch.float32, torch.bfloat16]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spans(lengths):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [(end - n, end) for end, n in zip(ends, lengths, strict=True)]


def rope_of(tokens, dim):
    angles = (randn(tokens, dim // 2, seed=5) * 3).repeat_interleave(2, -1)
    return torch.cat((angles.sin(), angles.cos()), -1)


# ---- each sequence alone -------------------------------------------------------------------------


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 64, 72, 128])
def test_a_sequence_has_the_bits_that_attention_gives_it(dim, dtype):
    """With norms of q and k and a rotary embedding, whatever stands beside it."""
    qkv = randn(sum(LENGTHS), 3, 3, dim, dtype=dtype)
    rope = rope_of(len(qkv), dim)
    options = dict(qk_norm="rms", q_norm_weight=randn(dim), k_norm_weight=randn(dim, seed=1))
    out = ops.varlen_attention(qkv, None, None, cumulative(LENGTHS), rope=rope, **options)
    for begin, end in spans(LENGTHS):
        alone = ops.attention(qkv[None, begin:end], rope=rope[begin:end], **options)
        assert same_bits(out[begin:end], alone[0])


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prefix_that_is_not_turned(dtype):
    """sin 0 and cos 1 stand for `rope_prefix` of `attention`."""
    qkv, rope = randn(20, 3, 2, 16, dtype=dtype), rope_of(20, 16)
    still = torch.cat((torch.zeros(16), torch.ones(16)))
    for begin in (0, 12):
        rope[begin : begin + 3] = still
    out = ops.varlen_attention(qkv, None, None, cumulative([12, 8]), rope=rope)
    for begin, end in ((0, 12), (12, 20)):
        tail = rope[begin + 3 : end]
        assert same_bits(
            out[begin:end], ops.attention(qkv[None, begin:end], rope=tail, rope_prefix=3)[0]
        )


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_sequences_do_not_know_each_other(backend):
    """NaN and infinity in one of them stay there."""
    qkv = randn(sum(LENGTHS), 3, 2, 16)
    want = ops.varlen_attention(qkv, None, None, cumulative(LENGTHS), backend=backend)
    spoilt = qkv.clone()
    spoilt[5:42] = float("nan")
    out = ops.varlen_attention(spoilt, None, None, cumulative(LENGTHS), backend=backend)
    assert out[5:42].isnan().all()
    assert torch.equal(out[:5], want[:5]) and torch.equal(out[42:], want[42:])


@pytest.mark.usefixtures("needs_native")
def test_the_order_of_sequences_does_not_matter():
    qkv, order = randn(sum(LENGTHS), 3, 2, 32), [6, 2, 0, 8, 1, 4, 5, 3, 7]
    places = spans(LENGTHS)
    moved = torch.cat([qkv[slice(*places[i])] for i in order])
    out = ops.varlen_attention(qkv, None, None, cumulative(LENGTHS))
    again = ops.varlen_attention(moved, None, None, cumulative([LENGTHS[i] for i in order]))
    assert torch.equal(again, torch.cat([out[slice(*places[i])] for i in order]))


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_each_sequence(dtype):
    """Those of the norms' weights are sums over all, in float32 before they are rounded."""
    lengths = [9, 0, 30, 1, 17]
    qkv = randn(sum(lengths), 3, 2, 16, dtype=dtype)
    weights = [1 + 0.1 * randn(16, dtype=dtype, seed=i) for i in (1, 2)]
    grad = randn(len(qkv), 2, 16, dtype=dtype, seed=3)

    def gradients(convert, function):
        leaves = [convert(t).detach().requires_grad_() for t in (qkv, *weights)]
        options = dict(qk_norm="rms", q_norm_weight=leaves[1], k_norm_weight=leaves[2])
        return torch.autograd.grad(function(leaves[0], **options), leaves, convert(grad))

    def one_by_one(qkv, **options):
        parts = [ops.attention(qkv[None, b:e], **options)[0] for b, e in spans(lengths)]
        return torch.cat(parts)

    def packed(qkv, **options):
        return ops.varlen_attention(qkv, None, None, cumulative(lengths), **options)

    truth = gradients(torch.Tensor.double, one_by_one)
    for t, r, b in zip(
        gradients(lambda t: t, packed), truth, gradients(lambda t: t, one_by_one), strict=True
    ):
        assert compare(t, r, b, factor=2.0, rms_factor=2.0).ok


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_from_a_slice_of_a_wide_tensor(backend):
    """flash-attention#2611: the result's gradient lies in rows of something much wider."""
    q, k, v = (randn(30, 2, 8, seed=i).requires_grad_() for i in range(3))
    wide = torch.full((30, 5000), float("nan"))
    wide[:, 4000:4016] = randn(30, 16, seed=4)
    seed = wide[:, 4000:4016].unflatten(1, (2, 8))
    assert seed.stride(0) == 5000
    out = ops.varlen_attention(q, k, v, cumulative([7, 23]), backend=backend)
    found = torch.autograd.grad(out, (q, k, v), seed, retain_graph=True)
    want = torch.autograd.grad(out, (q, k, v), seed.contiguous())
    torch.testing.assert_close(found, want)


@pytest.mark.usefixtures("needs_native")
def test_the_backend_may_change_between_the_passes():
    q = randn(30, 3, 2, 8).requires_grad_()
    want = torch.autograd.grad(ops.varlen_attention(q, None, None, cumulative([7, 23])).sum(), q)
    settings.backend = "reference"
    out = ops.varlen_attention(q, None, None, cumulative([7, 23]))
    settings.backend = "cpu"
    torch.testing.assert_close(torch.autograd.grad(out.sum(), q), want)


# ---- the CPU's kernels ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offsets", "wanted"),
    [
        ([0], []),
        ([0, 0, 0], []),
        ([0, 4], [(0, 4, 1)]),
        ([0, 4, 8, 12], [(0, 4, 3)]),
        ([0, 4, 4, 8], [(0, 4, 2)]),
        ([0, 0, 3, 5, 7, 10], [(0, 3, 1), (3, 2, 2), (7, 3, 1)]),
    ],
)
def test_runs(offsets, wanted):
    assert native.runs(offsets) == wanted


@pytest.mark.usefixtures("needs_native")
def test_nothing_is_copied_and_neighbours_of_one_length_go_together(monkeypatch):
    qkv, calls = randn(sum(LENGTHS), 3, 2, 16), []
    sound = attention_native.forward_into

    def noted(call, out, stats):
        calls.append((tuple(call.q.shape[:2]), call.q.data_ptr() - qkv.data_ptr()))
        assert call.q.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
        return sound(call, out, stats)

    monkeypatch.setattr(attention_native, "forward_into", noted)
    ops.varlen_attention(qkv, None, None, cumulative(LENGTHS))
    row = qkv.stride(0) * qkv.itemsize
    assert calls == [
        ((1, 5), 0), ((3, 37), 5 * row), ((1, 1), 116 * row), ((1, 130), 117 * row),
        ((2, 2), 247 * row),
    ]  # fmt: skip


def test_which_inputs_have_a_kernel(needs_native):
    assert has_kernel(torch.empty(0, 3, 2, 64))
    assert has_kernel(torch.empty(0, 3, 2, 64, dtype=torch.bfloat16))
    for t in (torch.empty(0, 3, 2, 264), torch.empty(0, 3, 2, 64, dtype=torch.float16)):
        assert not has_kernel(t)
    settings.disable = True
    assert not has_kernel(torch.empty(0, 3, 2, 64))


def test_compiled_once_for_all_lengths():
    """The lengths are values of a tensor: another split of as many tokens is the same graph."""
    torch._dynamo.reset()
    counter = CompileCounter()
    function = torch.compile(
        lambda q, where: ops.varlen_attention(q, None, None, where) * 2,
        backend=counter, fullgraph=True,
    )  # fmt: skip
    q = randn(30, 3, 2, 8)
    for lengths in ([7, 23], [20, 10], [0, 30]):
        want = 2 * ops.varlen_attention(q, None, None, cumulative(lengths))
        torch.testing.assert_close(function(q, cumulative(lengths)), want)
    assert counter.frame_count == 1
    with pytest.raises(Exception, match="cu_seqlens ends with 31"):
        function(q, cumulative([7, 24]))


# ---- torch's varlen attention --------------------------------------------------------------------


def attend(query, key, value, offsets, causal, scale):
    """What torch's does on a GPU, sequence by sequence."""
    out = [
        F.scaled_dot_product_attention(
            *(t[b:e].transpose(0, 1) for t in (query, key, value)), is_causal=causal, scale=scale
        ).transpose(0, 1)
        for b, e in zip(offsets.tolist(), offsets.tolist()[1:], strict=False)
    ]
    return torch.cat(out)


def as_in_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None,
    scale=None,
):  # fmt: skip
    CALLS.append((max_q, max_k))
    assert torch.equal(cu_seq_q, cu_seq_k)
    return attend(query, key, value, cu_seq_q, is_causal, scale)


def as_in_2_14(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    CALLS.append((max_q, max_k, num_splits))
    assert window_size in ((-1, -1), (-1, 0))
    return attend(query, key, value, cu_seq_k, window_size == (-1, 0), scale)


CALLS: list = []


@pytest.fixture(params=[as_in_2_11, as_in_2_14], ids=["2.11", "2.14"])
def on_torch(request, monkeypatch):
    """torch's function by the signature of a version, on the CPU."""
    CALLS.clear()
    monkeypatch.setattr(vendor, "_torch", lambda: SimpleNamespace(varlen_attn=request.param))
    vendor._arguments.cache_clear()
    yield request.param
    vendor._arguments.cache_clear()


def a_call(**options):
    q = randn(30, 3, 2, 16)
    usual = dict(
        q=q, k=None, v=None, cu_seqlens=cumulative([7, 0, 20, 3]), max_seqlen=None,
        is_causal=False, scale=None, qk_norm="", q_norm_weight=None, q_norm_bias=None,
        k_norm_weight=None, k_norm_bias=None, qk_norm_eps=1e-6, rope=None, rope_half=False,
    )  # fmt: skip
    return Call(**(usual | options))


OPTIONS = {
    "plain": {},
    "causal": dict(is_causal=True),
    "scale": dict(scale=0.7),
    "given_length": dict(max_seqlen=25),
    "norm_and_rope": dict(
        qk_norm="rms",
        q_norm_weight=1 + randn(16),
        k_norm_weight=1 - randn(16),
        rope=rope_of(30, 16),
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_vendor(on_torch, name):
    call = a_call(**OPTIONS[name])
    out, stats = vendor.forward(call)
    torch.testing.assert_close(out, reference.compute(call))
    longest = OPTIONS[name].get("max_seqlen", 20)
    assert CALLS[-1][:2] == (longest, longest) and stats.numel() == 0
    if on_torch is as_in_2_14:
        assert CALLS[-1][2] == 1  # FlashAttention, in inference, and no splits by the longest
    training = call._replace(save_stats=True)
    out, stats = vendor.forward(training)
    assert stats.shape == (2, 2, 30) and CALLS[-1][2:] in ((), (None,))
    grad = randn(30, 2, 16, seed=8)
    found = vendor.backward(grad, training, out, stats)
    for name, got, want in zip(INPUTS, found, reference.backward(grad, training), strict=True):
        torch.testing.assert_close(got, want, msg=name)


def test_vendor_refusals(monkeypatch):
    (why,) = vendor.can_run(a_call())
    assert "q is on cpu" in why
    monkeypatch.setattr(vendor, "_torch", lambda: None)
    assert "has no varlen attention" in vendor.available()[0]
    monkeypatch.setattr(vendor, "_torch", lambda: SimpleNamespace(varlen_attn=lambda q, max_q: q))
    vendor._arguments.cache_clear()
    try:
        assert "lacks cu_seq_k, cu_seq_q, max_k, scale" in vendor.available()[0]
    finally:
        vendor._arguments.cache_clear()


def test_the_installed_torch_has_the_arguments():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    assert vendor._torch() is varlen
    wanted = [] if torch.cuda.is_available() else ["torch sees no GPU"]
    assert vendor.available() == wanted and vendor._causal()
