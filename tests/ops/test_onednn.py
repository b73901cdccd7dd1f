"""oneDNN linears: as exact as the criterion asks, and never with a stale weight."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F

from vitfast.ops import _onednn, _weight_cache
from vitfast.runtime import native

pytestmark = pytest.mark.skipif(
    bool(native.reasons() or _onednn._missing()), reason="needs oneDNN and the extension"
)


@pytest.fixture(autouse=True)
def empty_cache():
    _weight_cache.clear_weight_cache()
    yield
    _weight_cache.clear_weight_cache()


def run(weight, x, bias=None, act="none"):
    with torch.no_grad():
        return _onednn.prepare(weight, bias, len(x), x.dtype, act)(x)


def packed(cache, weight):
    """As `prepare` asks for the packing of a linear layer."""
    return cache.get(weight, torch.float32, _onednn._pack.__name__, _onednn._pack)


def layer(n=24, k=40, dtype=torch.float32):
    return torch.nn.Parameter(torch.randn(n, k, dtype=dtype)), torch.randn(7, k, dtype=dtype)


def is_current(weight, x):
    """The answer is that of the weight as it is now, within rounding."""
    expected = x.double() @ weight.detach().double().T
    return bool(torch.allclose(run(weight, x).double(), expected, atol=1e-4))


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
    bias = torch.randn(24, dtype=dtype)
    z = F.linear(x.double(), weight.detach().double(), bias.double())
    approximate = "tanh" if act == "gelu_tanh" else "none"
    expected = z if act == "none" else F.gelu(z, approximate=approximate)
    rounding = torch.finfo(dtype).eps * expected.abs() + 1e-5
    assert ((run(weight, x, bias, act).double() - expected).abs() <= rounding).all()


def test_a_packing_is_used_again_unless_it_is_large_beside_many_rows():
    weight, x = layer()
    first = packed(_weight_cache.CACHE, weight)
    assert packed(_weight_cache.CACHE, weight)[0] is first[0]
    _weight_cache.clear_weight_cache()
    many = torch.randn(_weight_cache.CACHE_ROWS, 40)
    run(torch.randn(_weight_cache.CACHE_ELEMENTS // 40 + 1, 40), many)
    assert len(_weight_cache.CACHE) == 0
    run(weight, many)
    assert len(_weight_cache.CACHE) == 1


EDITS = {
    "no_grad_element": lambda w: w.__setitem__((0, 0), 9.0),
    "copy_": lambda w: w.copy_(torch.randn_like(w)),
    "lerp_": lambda w: w.lerp_(torch.randn_like(w), 0.1),
    "data_mul_": lambda w: w.data.mul_(2),
    "data_copy_": lambda w: w.data.copy_(torch.randn_like(w)),
    "data_row": lambda w: w.data[5].zero_(),
    "data_column": lambda w: w.data[:, 17].zero_(),
    "data_assigned": lambda w: setattr(w, "data", torch.randn_like(w)),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_every_kind_of_edit_is_seen(edit, shape):
    weight, x = layer(*shape)
    assert is_current(weight, x)
    with torch.no_grad():
        edit(weight)
    assert is_current(weight, x)


def test_optimizer_steps_and_load_state_dict_are_seen():
    model, x = torch.nn.Linear(40, 24, bias=False), torch.randn(7, 40)
    assert is_current(model.weight, x)
    model(x).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert is_current(model.weight, x)
    model.load_state_dict({"weight": torch.randn(24, 40)})
    assert is_current(model.weight, x)
    model.to(torch.bfloat16).to(torch.float32)
    assert is_current(model.weight, x)


def test_weights_of_inference_mode_are_seen():
    with torch.inference_mode():
        weight, x = torch.randn(24, 40), torch.randn(7, 40)
        assert is_current(weight, x)
        weight.mul_(3)
        assert is_current(weight, x)


def test_a_new_weight_at_an_old_address_is_seen():
    for _ in range(8):
        weight, x = layer()
        assert is_current(weight, x)
        del weight
        gc.collect()
        assert len(_weight_cache.CACHE) == 0


def test_copies_have_packings_of_their_own():
    weight, x = layer()
    run(weight, x)
    twin = copy.deepcopy(weight)
    with torch.no_grad():
        twin.mul_(2)
    assert is_current(twin, x) and is_current(weight, x)


def test_float32_weights_serve_bfloat16_products():
    weight, x = layer()
    low = x.bfloat16()
    expected = F.linear(low, weight.detach().bfloat16())
    assert torch.allclose(run(weight, low).float(), expected.float(), atol=0.1)
    with torch.no_grad():
        weight.zero_()
    assert not run(weight, low).any()


def test_the_cache_is_bounded():
    cache = _weight_cache.WeightCache(most_bytes=3 * 24 * 40 * 4)
    weights = [layer()[0] for _ in range(5)]
    for weight in weights:
        packed(cache, weight)
    assert len(cache) == 3
    assert cache.bytes == cache.most_bytes


def test_reasons_name_what_oneDNN_lacks():
    weight = torch.randn(8, 8)
    assert not _onednn.reasons(weight, None, torch.float32, "gelu")
    assert "quick_gelu" in _onednn.reasons(weight, None, torch.float32, "quick_gelu")[0]
    assert "pieces" in _onednn.reasons(torch.randn(8, 2000), None, torch.float32, "gelu")[0]
    assert _onednn.reasons(weight.double(), None, torch.float64, "none")
