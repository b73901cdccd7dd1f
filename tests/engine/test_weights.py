"""Weights that inference keeps in the order of its products: never a stale one."""

from __future__ import annotations

import copy
import gc
import os

import pytest
import torch
import torch.nn.functional as F

from vitfast.engine.products import onednn
from vitfast.engine.products import weights as weights_cache
from vitfast.engine.products.linear import apply_gemm, prepare_gemm
from vitfast.runtime import native
from vitfast.settings import settings

pytestmark = pytest.mark.usefixtures("needs_native", "needs_onednn", "empty_cache")


def on_onednn(weight, x):
    with torch.no_grad():
        return onednn.prepare(weight, None, len(x), x.dtype)(x)


def on_our_own(weight, x):
    with torch.no_grad():
        return apply_gemm(prepare_gemm(weight, None, len(x), x.dtype, keep=True), x)


@pytest.fixture(params=[on_onednn, on_our_own])
def run(request):
    """run(weight, x): a linear layer of x [M, K]."""
    return request.param


@pytest.fixture
def is_current(run):
    """is_current(weight, x): whether the answer is that of the weight as it is now."""

    def check(weight, x):
        expected = x.double() @ weight.detach().double().T
        return bool(torch.allclose(run(weight, x).double(), expected, atol=1e-4))

    return check


def layer(n=24, k=40, dtype=torch.float32):
    return torch.nn.Parameter(torch.randn(n, k, dtype=dtype)), torch.randn(7, k, dtype=dtype)


def packed(cache, weight):
    """As `prepare` asks for the packing of a linear layer."""
    return cache.get(weight, torch.float32, onednn._pack.__name__, onednn._pack)


def test_a_packing_is_used_again_unless_it_is_large_beside_many_rows(run):
    weight, x = layer()
    first = packed(weights_cache.CACHE, weight)
    assert packed(weights_cache.CACHE, weight)[0] is first[0]
    weights_cache.clear_weight_cache()
    many = torch.randn(weights_cache.CACHE_ROWS, 40)
    run(torch.randn(weights_cache.CACHE_ELEMENTS // 40 + 1, 40), many)
    assert len(weights_cache.CACHE) == 0
    run(weight, many)
    assert len(weights_cache.CACHE) == 1


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
def test_every_kind_of_edit_is_seen(is_current, edit, shape):
    weight, x = layer(*shape)
    assert is_current(weight, x)
    with torch.no_grad():
        edit(weight)
    assert is_current(weight, x)


def test_optimizer_steps_and_load_state_dict_are_seen(is_current):
    model, x = torch.nn.Linear(40, 24, bias=False), torch.randn(7, 40)
    assert is_current(model.weight, x)
    model(x).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert is_current(model.weight, x)
    model.load_state_dict({"weight": torch.randn(24, 40)})
    assert is_current(model.weight, x)
    model.to(torch.bfloat16).to(torch.float32)
    assert is_current(model.weight, x)


def edit_behind_pytorch(weight, i, j):
    weight.detach().numpy()[i, j] = 99.0


@pytest.mark.parametrize("shape", [(256, 320), (320, 256), (1000, 67)])
@pytest.mark.parametrize("place", [(0, 1), (-1, -2), (100, 3)])
def test_one_element_edited_behind_pytorch_is_seen_within_32_calls(is_current, shape, place):
    weight, x = layer(*shape)
    assert is_current(weight, x)
    edit_behind_pytorch(weight, *place)
    with pytest.warns(UserWarning, match="was edited in a way that PyTorch does not count"):
        seen = [is_current(weight, x) for _ in range(32)]
    assert seen[-1] and is_current(weight, x)


def test_one_element_of_a_small_weight_is_seen_at_once(is_current):
    weight, x = layer(120, 136)
    assert is_current(weight, x)
    edit_behind_pytorch(weight, 7, 100)
    assert is_current(weight, x)


def test_one_element_of_a_weight_of_inference_mode_is_seen_at_once(is_current):
    with torch.inference_mode():
        weight, x = torch.randn(256, 320), torch.randn(7, 320)
        assert is_current(weight, x)
        weight[0, 1] = 9.0
        assert is_current(weight, x)


@pytest.mark.parametrize("stride", [(400, 1), (1, 300), (2, 600)])
def test_the_whole_content_of_any_layout_is_looked_at(stride):
    weight = torch.randn(180_000).as_strided((256, 250), stride)
    found = weights_cache.state((weight,))
    assert all(weights_cache.same(found, (weight,)) for _ in range(64))
    for i, j in ((0, 1), (255, 248), (17, 200)):
        weight.data.numpy()[i, j] += 1
        assert not weights_cache.same(found, (weight,), fully=True)
        assert not all(weights_cache.same(found, (weight,)) for _ in range(32))
        weight.data.numpy()[i, j] -= 1
        found = weights_cache.state((weight,))


def test_weights_of_inference_mode_are_seen(is_current):
    with torch.inference_mode():
        weight, x = torch.randn(24, 40), torch.randn(7, 40)
        assert is_current(weight, x)
        weight.mul_(3)
        assert is_current(weight, x)


def test_a_new_weight_at_an_old_address_is_seen(is_current):
    for _ in range(8):
        weight, x = layer()
        assert is_current(weight, x)
        del weight
        gc.collect()
        assert len(weights_cache.CACHE) == 0


def test_copies_have_packings_of_their_own(is_current):
    weight, x = layer()
    assert is_current(weight, x)
    twin = copy.deepcopy(weight)
    with torch.no_grad():
        twin.mul_(2)
    assert is_current(twin, x) and is_current(weight, x)


def test_float32_weights_serve_bfloat16_products(run):
    weight, x = layer()
    why = onednn.reasons(weight, None, torch.bfloat16, "none")
    if run is on_onednn and why:
        pytest.skip("; ".join(why))
    low = x.bfloat16()
    expected = F.linear(low, weight.detach().bfloat16())
    assert torch.allclose(run(weight, low).float(), expected.float(), atol=0.1)
    with torch.no_grad():
        weight.zero_()
    assert not run(weight, low).any()


def test_the_cache_is_bounded():
    cache = weights_cache.WeightCache(most_bytes=3 * 24 * 40 * 4)
    weights = [layer()[0] for _ in range(5)]
    for weight in weights:
        packed(cache, weight)
    assert len(cache) == 3
    assert cache.bytes == cache.most_bytes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_a_lock_that_a_thread_held(fork_while_held):
    fork_while_held(weights_cache.CACHE._lock, weights_cache.clear_weight_cache)


def test_an_instruction_set_has_an_order_of_its_own():
    torch.manual_seed(0)
    weight, x = layer(70, 40)
    want = F.linear(x, weight.detach())
    try:
        for settings.cpu_isa in ("baseline", None, "baseline"):
            torch.testing.assert_close(on_our_own(weight, x), want)
    finally:
        settings.cpu_isa = None
    assert len(weights_cache.CACHE) == (1 if native.isa() == "baseline" else 2)


@pytest.mark.parametrize("gate", ["first", "last"])
def test_a_packed_gate(gate):
    weight, x = layer(48, 40)
    for _ in range(2):
        ready = prepare_gemm(weight, None, len(x), x.dtype, gate=gate, keep=True)
        first, last = F.linear(x, weight.detach()).chunk(2, -1)
        want = first.relu() * last if gate == "first" else first * last.relu()
        torch.testing.assert_close(apply_gemm(ready, x, "relu"), want, rtol=1e-4, atol=1e-4)
        weight.data.mul_(-1)
    assert len(weights_cache.CACHE) == 1


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rows_of_patches_have_their_channels_last(keep, memory_format):
    weight = torch.randn(24, 5, 2, 3).to(memory_format=memory_format)
    patches = torch.randn(7, 5, 2, 3)
    ready = prepare_gemm(weight, None, 7, torch.float32, keep=keep, channels_last=True)
    rows = patches.permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(apply_gemm(ready, rows), F.conv2d(patches, weight)[:, :, 0, 0])


@pytest.mark.parametrize("dtype, k", [(torch.float32, 1024), (torch.bfloat16, 2048)])
@pytest.mark.parametrize("rows", [14, 15, 61, 300])
def test_rows_that_share_cache_sets(dtype, k, rows):
    """They are copied apart; the sums are those of the same rows elsewhere, bit by bit."""
    weight = torch.randn(330, k).to(dtype)
    x = torch.randn(rows, k).to(dtype)
    apart = torch.empty(rows, k + 48, dtype=dtype)[:, :k].copy_(x)
    got = on_our_own(weight, x)
    assert torch.equal(got, on_our_own(weight, apart))
    exact = x.double() @ weight.double().T
    assert (got - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max() * 8
