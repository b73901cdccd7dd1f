"""What must not change a result: a row's company, the order of heads, a shift of all logits."""

from __future__ import annotations

import math

import pytest
import torch

import vitfast.ops as ops

pytestmark = pytest.mark.usefixtures("needs_native")
DTYPES = [torch.float32, torch.bfloat16]


def randn(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


ROWWISE = {
    "layer_norm": lambda x, d: ops.layer_norm(x, randn(70, dtype=d), randn(70, dtype=d)),
    "rms_norm": lambda x, d: ops.rms_norm(x, randn(70, dtype=d)),
    "add_norm": lambda x, d: ops.add_norm(x, x * 2, randn(70, dtype=d))[1],
    "norm_add": lambda x, d: ops.norm_add(x * 2, x, randn(70, dtype=d)),
    "residual_add": lambda x, d: ops.residual_add(x, x * 2, gamma=randn(70, dtype=d)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ROWWISE)
def test_a_row_alone_has_the_same_bits(op, dtype):
    x = randn(3, 37, 70, dtype=dtype)
    whole = ROWWISE[op](x, dtype)
    for b, n in ((0, 0), (1, 5), (2, 36)):
        assert torch.equal(ROWWISE[op](x[b : b + 1, n : n + 1], dtype)[0, 0], whole[b, n])


@pytest.mark.parametrize("op", ROWWISE)
def test_nan_stays_in_its_row(op):
    x = randn(3, 37, 70, dtype=torch.float32)
    x[1, 5, 8] = math.nan
    nan = ROWWISE[op](x, torch.float32).isnan()
    assert nan[1, 5].any()
    nan[1, 5] = False
    assert not nan.any()


def qkv(dtype, n=150, keys=None, dim=32):
    return [
        randn(3, m, 4, dim, dtype=dtype, seed=i) for i, m in enumerate((n, keys or n, keys or n))
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [7, 150])
def test_an_image_alone_has_the_same_bits(tokens, dtype):
    q, k, v = qkv(dtype, tokens)
    whole = ops.attention(q, k, v)
    for b in range(3):
        alone = ops.attention(*(t[b : b + 1] for t in (q, k, v)))
        assert torch.equal(alone[0], whole[b])


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_do_not_know_each_other(dtype):
    q, k, v = qkv(dtype)
    order = [2, 0, 3, 1]
    permuted = ops.attention(*(t[:, :, order] for t in (q, k, v)))
    assert torch.equal(permuted, ops.attention(q, k, v)[:, :, order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_and_separate_inputs_give_the_same_bits(dtype):
    q, k, v = qkv(dtype)
    packed = torch.stack((q, k, v), 2)
    assert torch.equal(ops.attention(packed), ops.attention(q, k, v))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_keys_changes_roundings_only(dtype):
    q, k, v = qkv(dtype)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(
        ops.attention(q, k[:, order], v[:, order]), ops.attention(q, k, v), rtol=0.02, atol=2e-6
        if dtype == torch.float32 else 4e-3,
    )  # fmt: skip


@pytest.mark.parametrize("shift", [-6e4, -1e3, 1e3])
def test_a_shift_of_all_logits_changes_roundings_only(shift):
    q, k, v = qkv(torch.float32)
    shifted = ops.attention(q, k, v, mask=torch.full((1, 150), shift))
    # The logits lose the bits that the shift takes.
    lost = abs(shift) * 2.0**-23
    torch.testing.assert_close(shifted, ops.attention(q, k, v), rtol=0, atol=4 * lost)


@pytest.mark.parametrize("live", [0, 15, 16, 63, 64, 149])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_visible_key_gives_its_value_wherever_it_stands(dtype, live):
    """Tiles before it are fully masked, whatever their number."""
    q, k, v = qkv(dtype)
    keep = torch.zeros(150, dtype=torch.bool)
    keep[live] = True
    for mask in (keep[None], torch.zeros(1, 150).masked_fill(~keep, -math.inf)):
        out = ops.attention(q, k, v, mask=mask)
        assert torch.equal(out, v[:, live : live + 1].expand_as(out))


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_values_come_out_as_they_are(dtype):
    """The weights of a row sum up to one, but for two sums of 150 roundings."""
    q, k, v = qkv(dtype)
    v = v[:, :1].expand_as(v)
    out = ops.attention(q, k, v)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, v, rtol=16 * eps if dtype == torch.float32 else eps, atol=0)
