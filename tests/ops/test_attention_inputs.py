"""What `attention` refuses, with which error, and the unusual inputs that it must take."""

from __future__ import annotations

import pytest
import torch

from vitfast.errors import (
    BackendUnavailableError,
    DeviceError,
    InputTypeError,
    InputValueError,
    UnsupportedInputError,
)
from vitfast.ops import attention

B, N, H, D = 2, 6, 3, 8


def qkv(*sizes, dtype=torch.float32, **options):
    return tuple(torch.randn(*(sizes or (B, N, H, D)), **options).to(dtype) for _ in range(3))


Q, K, V = qkv()
PACKED = torch.stack((Q, K, V), 2)

REFUSED = {
    "q_not_a_tensor": (InputTypeError, (Q.numpy(), K, V), {}, "q must be a torch.Tensor"),
    "q_int64": (InputTypeError, (Q.long(), K, V), {}, "q has dtype torch.int64"),
    "q_complex": (InputTypeError, (Q.cfloat(), K, V), {}, "q has dtype"),
    "q_float8": (UnsupportedInputError, (Q.to(torch.float8_e4m3fn), K, V), {}, "not implemented"),
    "q_sparse": (UnsupportedInputError, (Q.to_sparse(), K, V), {}, "sparse"),
    "k_other_dtype": (InputTypeError, (Q.half(), K.bfloat16(), V.half()), {}, "k has torch.bf"),
    "k_other_device": (DeviceError, (Q, K.to("meta"), V), {}, "q is on cpu, but k is on meta"),
    "mask_other_device": (DeviceError, (Q, K, V), {"mask": torch.ones(N, N, device="meta")},
                          "mask is on meta"),
    "only_k": (InputValueError, (Q, K), {}, "k and v go together"),
    "only_v": (InputValueError, (Q, None, V), {}, "k and v go together"),
    "q_rank_2": (InputValueError, (Q[0, 0], K, V), {}, "q has shape"),
    "q_rank_5": (InputValueError, (PACKED, K, V), {}, "q has shape"),
    "packed_rank_4": (InputValueError, (Q,), {}, r"\[B, N, 3, H, D\]"),
    "packed_of_2": (InputValueError, (PACKED[:, :, :2],), {}, r"\[B, N, 3, H, D\]"),
    "k_head_dim": (InputValueError, (Q, K[..., :4], V), {}, "k has shape"),
    "k_heads": (InputValueError, (Q, K[:, :, :2], V[:, :, :2]), {}, "k has shape"),
    "v_tokens": (InputValueError, (Q, K, V[:, :4]), {}, "v has shape"),
    "k_batch": (InputValueError, (Q, K[:1], V[:1]), {}, "k has shape"),
    "head_dim_0": (InputValueError, (Q[..., :0], K[..., :0], V[..., :0]), {}, "head dim is empty"),
    "head_dim_0_scaled": (InputValueError, (PACKED[..., :0],), {"scale": 1.0}, "head dim is empty"),
    "mask_keys": (InputValueError, (Q, K, V), {"mask": torch.ones(N, N + 1)}, "not broadcastable"),
    "mask_rank_5": (InputValueError, (Q, K, V), {"mask": torch.ones(1, 1, 1, N, N)}, "not broadc"),
    "mask_widens": (InputValueError, (Q[:1], K[:1], V[:1]), {"mask": torch.ones(B, 1, N, N)},
                    "not broadcastable"),
    "mask_int": (InputTypeError, (Q, K, V), {"mask": torch.ones(N, N).int()}, "mask has dtype"),
    "mask_float64": (InputTypeError, (Q, K, V), {"mask": torch.ones(N, N).double()}, "float64"),
    "bias_float64": (InputTypeError, (Q.half(), K.half(), V.half()),
                     {"bias": torch.zeros(H, N, N).double()}, "bias has dtype torch.float64"),
    "bias_bool": (InputTypeError, (Q, K, V), {"bias": torch.ones(H, N, N).bool()}, "bias has"),
    "bias_not_dense": (InputValueError, (Q, K, V), {"bias": torch.zeros(1, N, N)}, "bias has"),
    "bias_per_batch": (InputValueError, (Q, K, V), {"bias": torch.zeros(B, H, N, N)}, "bias has"),
    "scale_nan": (InputValueError, (Q, K, V), {"scale": float("nan")}, "scale must be finite"),
    "scale_inf": (InputValueError, (Q, K, V), {"scale": float("inf")}, "scale must be finite"),
    "norm_unknown": (InputValueError, (Q, K, V), {"qk_norm": "batch"}, "qk_norm must be"),
    "norm_missing": (InputValueError, (Q, K, V), {"q_norm_weight": torch.ones(D)}, "without"),
    "norm_shape": (InputValueError, (Q, K, V),
                   {"qk_norm": "rms", "k_norm_weight": torch.ones(D + 1)}, "k_norm_weight has"),
    "norm_rms_bias": (InputValueError, (Q, K, V),
                      {"qk_norm": "rms", "q_norm_bias": torch.ones(D)}, "no bias"),
    "norm_eps": (InputValueError, (Q, K, V), {"qk_norm": "rms", "qk_norm_eps": 0.0}, "eps must be"),
    "rope_tokens": (InputValueError, (Q, K, V), {"rope": torch.ones(N, 2 * D), "rope_prefix": 1},
                    "rope has shape"),
    "rope_width": (InputValueError, (Q, K, V), {"rope": torch.ones(N, D)}, "rope has shape"),
    "rope_heads": (InputValueError, (Q, K, V), {"rope": torch.ones(2, N, 2 * D)}, "rope has shape"),
    "rope_rank_1": (InputValueError, (Q, K, V), {"rope": torch.ones(2 * D)}, "rope has shape"),
    "rope_int": (InputTypeError, (Q, K, V), {"rope": torch.ones(N, 2 * D).int()}, "rope has dtype"),
    "rope_odd_head_dim": (InputValueError, (Q[..., :7], K[..., :7], V[..., :7]),
                          {"rope": torch.ones(N, 14)}, "even head dim"),
    "rope_cross": (InputValueError, (Q, K[:, :4], V[:, :4]), {"rope": torch.ones(N, 16)}, "alike"),
    "rope_prefix": (InputValueError, (Q, K, V), {"rope_prefix": N + 1}, "rope_prefix is 7"),
    "rope_prefix_negative": (InputValueError, (Q, K, V), {"rope_prefix": -1}, "rope_prefix is -1"),
    "backend_unknown": (InputValueError, (Q, K, V), {"backend": "abacus"}, "no backend 'abacus'"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    error, args, kwargs, message = REFUSED[what]
    with pytest.raises(error, match=message) as caught:
        attention(*args, **kwargs)
    assert str(caught.value).startswith("attention: ")


NATIVE_CANNOT = {
    "float16": (qkv(dtype=torch.float16), {}, "float16"),
    "float64": (qkv(dtype=torch.float64), {}, "float64"),
    "head_dim_512": (qkv(1, 4, 1, 512), {}, "head dim 512 is above 256"),
    "mask_requires_grad": ((Q, K, V), {"mask": torch.randn(N, N, requires_grad=True)},
                           "mask requires grad"),
    "rope_requires_grad": ((Q, K, V), {"rope": torch.randn(N, 2 * D, requires_grad=True)},
                           "rope requires grad"),
    "rope_float64": ((Q, K, V), {"rope": torch.randn(N, 2 * D).double()}, "rope is float64"),
}  # fmt: skip


@pytest.mark.parametrize("what", NATIVE_CANNOT)
def test_what_the_kernels_cannot_do_falls_back_or_is_refused_by_name(what):
    args, kwargs, reason = NATIVE_CANNOT[what]
    with pytest.raises(BackendUnavailableError, match=reason):
        attention(*args, **kwargs, backend="cpu")
    want = attention(*args, **kwargs, backend="reference")
    torch.testing.assert_close(attention(*args, **kwargs), want, rtol=1e-3, atol=2e-3)


def test_vendor_refuses_to_train_under_a_float_mask():
    """torch's flash backward gives every key weight 1 where finfo.min drowned the scores."""
    q, k, v = qkv(dtype=torch.float64)
    mask = torch.zeros(N, N, dtype=torch.float64)
    mask[3:] = torch.finfo(torch.float64).min
    with pytest.raises(BackendUnavailableError, match="float mask"):
        attention(q.requires_grad_(), k, v, mask=mask, backend="vendor")
    v.requires_grad_()
    attention(q, k, v, mask=mask)[:, 4].sum().backward()
    torch.testing.assert_close(v.grad, torch.full_like(v, 1 / N))


@pytest.mark.parametrize("backend", ["auto", "vendor", "reference"])
@pytest.mark.parametrize(
    ("queries", "keys", "batch"), [(0, 5, 2), (5, 0, 2), (5, 5, 0), (0, 0, 2)], ids=str
)
def test_empty(backend, queries, keys, batch):
    q, k, v = (torch.randn(batch, n, H, D, requires_grad=True) for n in (queries, keys, keys))
    bias = torch.randn(H, queries, keys, requires_grad=True)
    out = attention(q, k, v, bias=bias, backend=backend)
    assert out.shape == q.shape and not out.any()
    out.sum().backward()
    for t in (q, k, v, bias):
        assert t.grad.shape == t.shape and not t.grad.any()


def test_nan_in_the_mask_reaches_its_row_only():
    mask = torch.zeros(N, N)
    mask[2, 3] = float("nan")
    for backend in ("auto", "vendor", "reference"):
        out = attention(Q, K, V, mask=mask, backend=backend)
        assert out[:, 2].isnan().all()
        assert not out[:, [0, 1, 3, 4, 5]].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_misaligned_and_reversed_memory(dtype):
    q, k, v = qkv(dtype=dtype)
    want = attention(q, k, v)
    shifted = torch.empty(q.numel() + 1, dtype=dtype)[1:].view_as(q).copy_(q)
    assert torch.equal(attention(shifted, k, v), want)
    assert torch.equal(attention(q.flip(1).flip(1), k.flip(-1).flip(-1), v), want)


def test_meta_tensors():
    q, k, v = qkv(device="meta")
    out = attention(q.requires_grad_(), k, v)
    assert out.device.type == "meta" and out.shape == q.shape
    out.sum().backward()
    assert q.grad.device.type == "meta" and q.grad.shape == q.shape


def test_wrapper_subclasses_run_torch_ops():
    from torch.testing._internal.two_tensor import TwoTensor

    both = TwoTensor(PACKED.clone(), PACKED * 2).requires_grad_()
    out = attention(both, is_causal=True)
    assert isinstance(out, TwoTensor)
    torch.testing.assert_close(out.b, attention(PACKED * 2, is_causal=True))
    out.sum().backward()
    assert both.grad.shape == PACKED.shape


def test_changing_a_saved_input_in_place_is_noticed():
    x = PACKED.clone().requires_grad_()
    y = x * 1
    out = attention(y)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_not_twice_differentiable():
    x = PACKED.clone().requires_grad_()
    (grad,) = torch.autograd.grad(attention(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        grad.sum().backward()
