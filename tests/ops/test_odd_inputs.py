"""Arguments that are odd and right: any size, rank, scale and mask, nothing at all, subclasses."""

from __future__ import annotations

import math

import pytest
import torch

import vitfast.ops as ops
from tests.ops.good_arguments import OPS, TENSORS, good
from vitfast.errors import BackendUnavailableError


def attention(q, k, v, backend="auto", **options):
    """Against the reference in the same dtype."""
    got = ops.attention(q, k, v, backend=backend, **options)
    want = ops.spec_of("attention").reference(q, k, v, **options)
    torch.testing.assert_close(got, want, equal_nan=True)
    return got


def qkv(b=2, n=5, h=3, d=8, keys=None):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(b, m, h, d, generator=g) for m in (n, keys or n, keys or n)]


@pytest.mark.parametrize("dim", [1, 2, 7, 8, 12, 72, 80, 88, 104, 112, 256, 257, 512])
def test_any_head_dim(dim):
    attention(*qkv(d=dim))


def test_a_head_dim_that_the_kernel_lacks_is_refused_by_name(needs_native):
    with pytest.raises(BackendUnavailableError, match="512"):
        ops.attention(*qkv(d=512), backend="cpu")


@pytest.mark.parametrize("sizes", [{"n": 0}, {"b": 0}, {"h": 0}, {"n": 0, "keys": 5}])
def test_empty_attention(sizes):
    q, k, v = (t.requires_grad_() for t in qkv(**sizes))
    out = ops.attention(q, k, v)
    assert out.shape == q.shape
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(not g.any() for g in grads)


def test_no_keys_give_zeros():
    q, k, v = (t.requires_grad_() for t in qkv())
    out = ops.attention(q, k[:, :0], v[:, :0])
    assert not out.any()
    out.sum().backward()
    assert not any(t.grad.any() for t in (q, k, v))


def test_a_window_of_any_size_that_the_map_fills():
    qkv = torch.randn(1, 1, 70_000, 3, 1, 1, device="meta")
    assert ops.window_attention(qkv, (1, 70_000)).shape == (1, 1, 70_000, 1, 1)


@pytest.mark.parametrize("mask", ["bool", "float"])
def test_a_row_that_sees_nothing_is_zero_and_gives_no_gradient(mask):
    q, k, v = (t.requires_grad_() for t in qkv())
    keep = torch.ones(5, 5, dtype=torch.bool)
    keep[2] = False
    if mask == "float":
        keep = torch.zeros(5, 5).masked_fill(~keep, -math.inf)
    out = ops.attention(q, k, v, mask=keep)
    assert not out[:, 2].any() and out[:, 1].all()
    out.sum().backward()
    assert not q.grad[:, 2].any()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


def test_nan_in_the_mask_stays_in_its_row():
    mask = torch.zeros(5, 5)
    mask[1, 3] = math.nan
    out = attention(*qkv(), mask=mask)
    assert out[:, 1].isnan().all()
    assert out[:, [0, 2, 3, 4]].isfinite().all()


def test_nan_in_a_query_stays_in_its_row_and_head(needs_native):
    q, k, v = qkv()
    q[0, 2, 1, 3] = math.nan
    out = attention(q, k, v, backend="cpu")  # torch's own SDPA makes such a row zero
    assert out[0, 2, 1].isnan().all()
    assert int(out.isnan().sum()) == 8


def test_nan_and_infinity_in_keys_and_values_propagate():
    q, k, v = qkv()
    k[0, 2, 1, 3] = math.nan
    v[1, 4, 0, 2] = math.inf
    out = attention(q, k, v)
    assert out[0, :, 1].isnan().all() and out[0, :, [0, 2]].isfinite().all()
    assert out[1, :, 0, 2].isposinf().all()


@pytest.mark.parametrize("scale", [0, 0.0, -0.5, 3, torch.tensor(0.25).item()])
def test_any_finite_scale(scale):
    attention(*qkv(), scale=scale)


@pytest.mark.parametrize("backend", ["auto", "vendor"])
@pytest.mark.parametrize("shape", [(5,), (5, 5), (3, 1, 5), (2, 1, 1, 5), (2, 3, 5, 5), (1, 1)])
def test_masks_of_every_shape(shape, backend):
    attention(*qkv(), mask=torch.randn(shape), backend=backend)
    attention(*qkv(), mask=torch.randn(shape) > -1, backend=backend)


@pytest.mark.parametrize("keys", [7, 43, 49])
def test_bias_and_mask_of_odd_widths_in_any_layout(keys):
    q, k, v = qkv(n=keys)
    bias = torch.randn(3, keys, keys)
    for b in (bias, bias.mT.contiguous().mT, bias[:1].expand(3, keys, keys)):
        attention(q, k, v, bias=b)
        attention(q, k, v, bias=b[None], mask=b.sum(0) > 0)


def test_heads_and_tokens_swapped_is_not_taken_for_packed():
    with pytest.raises(ValueError, match="packed"):
        ops.attention(torch.randn(2, 3, 5, 8))


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 5, 8), (2, 3, 5, 8), (2, 1, 3, 5, 8)])
def test_norms_of_every_rank(op, shape):
    x, weight = torch.randn(shape), torch.randn(8)
    reference = ops.spec_of(op).reference
    torch.testing.assert_close(getattr(ops, op)(x, weight), reference(x, weight))


def test_norm_weights_in_float32_beside_bfloat16():
    x, w = torch.randn(2, 5, 8).bfloat16(), torch.randn(8)
    assert ops.layer_norm(x, w, w).dtype == torch.bfloat16
    assert ops.rms_norm(x, w).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "op", ["layer_norm", "rms_norm", "add_norm", "norm_add", "residual_add", "linear_act"]
)
def test_rows_without_channels_or_without_tokens(op):
    for shape in ((0, 8), (2, 0, 8), (0, 5, 8)):
        arguments = {k: v for k, v in good(op).items() if k not in ("x", "branch", "drop_scale")}
        arguments["x"] = torch.randn(shape)
        if "branch" in good(op):
            arguments["branch"] = torch.randn(shape)
        result = getattr(ops, op)(**arguments)
        result = result if isinstance(result, torch.Tensor) else result[0]
        assert result.shape[:-1] == shape[:-1] and result.numel() == 0


@pytest.mark.parametrize("shape", [(0, 5, 6, 8), (2, 0, 6, 8), (2, 5, 0, 8)])
def test_maps_without_pixels(shape):
    arguments = good("patch_merge") | {"x": torch.randn(shape).requires_grad_()}
    arguments["weight"].requires_grad_()
    y = ops.patch_merge(**arguments)
    y.sum().backward()
    assert y.shape == (shape[0], (shape[1] + 1) // 2, (shape[2] + 1) // 2, 32)
    assert arguments["x"].grad.shape == shape
    assert torch.equal(arguments["weight"].grad, torch.zeros(32))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("shape", [(0, 5, 6, 8), (2, 0, 6, 8), (2, 5, 0, 8), (2, 5, 6, 0)])
def test_convolutions_without_pixels(shape, backend):
    arguments = {
        k: v[: shape[3]].requires_grad_() for k, v in good("dwconv_norm").items() if k != "x"
    }
    x = torch.randn(shape).requires_grad_()
    y = ops.dwconv_norm(x, **arguments, backend=backend)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in arguments.values())


@pytest.mark.parametrize("shape", [(0, 8, 5, 6), (2, 8, 0, 6), (2, 8, 5, 0)])
def test_groups_without_pixels(shape):
    arguments = good("group_norm_act")
    arguments |= {n: torch.randn(shape).requires_grad_() for n in ("x", "residual")}
    arguments["weight"].requires_grad_()
    y = ops.group_norm_act(**arguments)
    y.sum().backward()
    assert y.shape == arguments["x"].grad.shape == arguments["residual"].grad.shape == shape
    assert torch.equal(arguments["weight"].grad, torch.zeros(8))


def test_images_without_batch_entries():
    arguments = good("patch_embed")
    arguments["image"] = arguments["image"][:0]
    assert ops.patch_embed(**arguments).shape == (0, 7, 6)


@pytest.mark.parametrize("op", OPS)
def test_a_subclass_of_tensor_gives_the_right_numbers(op):
    class Labelled(torch.Tensor):
        """A subclass as users write them."""

    arguments = good(op)
    want = getattr(ops, op)(**arguments)
    name = next(iter(arguments))
    got = getattr(ops, op)(**arguments | {name: arguments[name].as_subclass(Labelled)})
    for a, b in zip(
        *((t,) if isinstance(t, torch.Tensor) else t for t in (got, want)), strict=True
    ):
        assert torch.equal(a.as_subclass(torch.Tensor), b)


@pytest.mark.parametrize("op", OPS)
def test_parameters_are_tensors(op):
    arguments = {
        k: torch.nn.Parameter(v) if (op, k) in TENSORS and k != "drop_scale" else v
        for k, v in good(op).items()
    }
    result = getattr(ops, op)(**arguments)
    result = result if isinstance(result, torch.Tensor) else result[1]
    result.sum().backward()
    assert all(v.grad is not None for v in arguments.values() if isinstance(v, torch.nn.Parameter))
