"""oneDNN linears: as exact as the criterion asks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitfast.engine.products import onednn

pytestmark = pytest.mark.usefixtures("needs_native", "needs_onednn", "empty_cache")


def run(weight, x, bias=None, act="none"):
    with torch.no_grad():
        return onednn.prepare(weight, bias, len(x), x.dtype, act)(x)


def layer(n=24, k=40, dtype=torch.float32):
    return torch.nn.Parameter(torch.randn(n, k, dtype=dtype)), torch.randn(7, k, dtype=dtype)


@pytest.mark.parametrize("k", [13, 768, 1024, 1040, 1536, 3072, 4304])
def test_error_is_at_most_twice_that_of_torch(k):
    x, weight = torch.randn(197, k), torch.randn(384, k) * k**-0.5
    exact = x.double() @ weight.double().T
    ours, torchs = run(weight, x) - exact, F.linear(x, weight) - exact
    assert ours.square().mean().sqrt() <= 2 * torchs.square().mean().sqrt()
    # The largest of 75,648 errors, is luck on both sides.
    assert ours.abs().max() <= 15 * ours.square().mean().sqrt() + 1e-6


@pytest.mark.parametrize("act", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations(act, dtype):
    weight, x = layer(dtype=dtype)
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this CPU")
    bias = torch.randn(24, dtype=dtype)
    z = F.linear(x.double(), weight.detach().double(), bias.double())
    approximate = "tanh" if act == "gelu_tanh" else "none"
    expected = z if act == "none" else F.gelu(z, approximate=approximate)
    rounding = torch.finfo(dtype).eps * expected.abs() + 1e-5
    assert ((run(weight, x, bias, act).double() - expected).abs() <= rounding).all()


def test_reasons_name_what_oneDNN_lacks():
    weight = torch.randn(8, 8)
    assert not onednn.reasons(weight, None, torch.float32, "gelu")
    assert "quick_gelu" in onednn.reasons(weight, None, torch.float32, "quick_gelu")[0]
    assert "pieces" in onednn.reasons(torch.randn(8, 2000), None, torch.float32, "gelu")[0]
    assert onednn.reasons(weight.double(), None, torch.float64, "none")
