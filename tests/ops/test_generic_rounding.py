"""Rounding to bfloat16, bit for bit as torch rounds: ties, NaN of any payload, the largest numbers.

Every op that may give bfloat16 for float32 is made to give its input, or twice that, exactly.
"""

from __future__ import annotations

import pytest
import torch

import vitfast.ops as ops

pytestmark = pytest.mark.usefixtures("needs_native")

LOW = torch.bfloat16


def words() -> torch.Tensor:
    """Numbers of float32 [N]: every exponent and sign with bits that are below, at and above a tie,
    beside an even and an odd neighbour; infinities and NaN of small, large and full payloads."""
    high = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    high = high[(high & 0x7F).ne(0) | (high & 0x7F80).ne(0x7F80)]  # infinity comes below
    high = high[(high % 5 < 2) | ((high & 0x7F).ge(0x7E))]
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    odd = [0x7F800000, 0x7F800001, 0x7FFFFFFF, 0x7F80FFFF, 0x7FC00000, 0x7FBFFFFF, 0x7FFF8000]
    odd = torch.tensor(odd, dtype=torch.int32)
    return torch.cat([((high << 16)[:, None] | low).flatten(), odd, odd | -(1 << 31)]).view(
        torch.float32
    )


def map_of(channels: int) -> torch.Tensor:
    """The words as rows [1, H, 1, channels], the last ones zeros."""
    flat = words()
    rows = -(-flat.numel() // channels)
    out = torch.zeros(rows * channels)
    out[: flat.numel()] = flat
    return out.view(1, rows, 1, channels)


def _convolved(x):
    one = torch.ones(x.shape[-1], 1, 1, 1)
    return ops.dwconv_norm(x, one, norm=None, out_dtype=LOW, backend="cpu")


def _merged(x):
    y = ops.patch_merge(x.view(x.shape[1], 1, 1, -1), norm=None, out_dtype=LOW, backend="cpu")
    return y[..., : x.shape[-1]].view(x.shape)


IDENTITIES = {"dwconv_norm": _convolved, "patch_merge": _merged}


@pytest.mark.parametrize("channels", [1, 7, 16, 61])
@pytest.mark.parametrize("op", IDENTITIES)
def test_float32_is_rounded_as_torch_rounds(op, channels):
    x = map_of(channels)
    if op == "dwconv_norm":  # multiplied by one: the hardware may take a denormal for zero
        x = x.where(~(x.abs() < torch.finfo(torch.float32).tiny), 0.0)
    got, want = IDENTITIES[op](x), x.to(LOW)
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got[~nan].view(torch.int16), want[~nan].view(torch.int16))


@pytest.mark.parametrize("channels", [1, 7, 16, 61])
def test_sums_of_bfloat16_are_rounded_to_even(channels):
    """Where half the numbers added are at a tie."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(128, 256, (1, 200, channels), generator=g).to(LOW)
    half = torch.tensor([0.5, 1.5, -0.5, 0.25])
    branch = half[torch.randint(0, 4, x.shape, generator=g)].to(LOW)
    got = ops.residual_add(x, branch, backend="cpu")
    want = (x.float() + branch.float()).to(LOW)
    assert torch.equal(got, want)


@pytest.mark.parametrize("payload", [0x7F81, 0x7FFF, 0x7FC0, -0x0001, -0x007F])
def test_nan_of_any_payload_stays_nan(payload):
    """An op that reads and writes bfloat16, such as attention of one key, which gives its value."""
    nan = torch.tensor(payload, dtype=torch.int16).view(LOW)
    x = torch.ones(1, 3, 2, 9, dtype=LOW)
    x[0, 1, 1, 4] = nan
    outputs = {
        "attention": ops.attention(x[:, :1] * 0, x[:, :1] * 0, x[:, 1:2], backend="cpu"),
        "residual_add": ops.residual_add(x[0], torch.zeros_like(x[0]), backend="cpu"),
        "patch_merge": ops.patch_merge(x, norm=None, backend="cpu"),
        "dwconv_norm": ops.dwconv_norm(
            x, torch.ones(9, 1, 1, 1, dtype=LOW), norm=None, backend="cpu"
        ),
    }
    for op, out in outputs.items():
        assert int(out.isnan().sum()) == 1, op


def test_gradients_of_huge_pixels_stay_infinite():
    """A sum that is compensated for its rounding makes NaN of infinity, if nothing is done."""
    x = torch.full((1, 20, 40, 8), 3e38)
    weight = torch.ones(8, 1, 3, 3, requires_grad=True)
    bias = torch.ones(8, requires_grad=True)
    out = ops.dwconv_norm(x, weight, bias, norm=None, backend="cpu")
    dweight, dbias = torch.autograd.grad(out, (weight, bias), torch.ones_like(out))
    assert dweight.isposinf().all()
    assert dbias.eq(800).all()
