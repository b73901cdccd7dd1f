"""What a block remembers between calls: never anything that has changed since."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import gc
import pickle
import threading

import pytest
import timm
import torch
from timm.models import eva
from timm.models.convnext import ConvNeXtBlock
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import nn

from vitfast.engine import memo as engine_memo
from vitfast.engine.products import weights as weights_cache
from vitfast.runtime import native
from vitfast.settings import settings
from vitfast.swap import swap

pytestmark = pytest.mark.usefixtures("needs_native")

C = 48
GELUS = (nn.GELU, timm.layers.GELU)


def vit():
    return Block(C, 3, qkv_bias=True, qk_norm=True, init_values=0.1), torch.randn(2, 10, C)


def convnext():
    return ConvNeXtBlock(C, ls_init_value=0.1), torch.randn(2, C, 7, 9)


def convnext_v2():
    return ConvNeXtBlock(C, use_grn=True, ls_init_value=None), torch.randn(2, C, 7, 9)


def swin():
    block = SwinTransformerBlock(C, (14, 14), num_heads=3, window_size=7, shift_size=3)
    return block, torch.randn(2, 14, 14, C)


def merging():
    return PatchMerging(C), torch.randn(2, 14, 14, C)


BLOCKS = [vit, convnext, convnext_v2, swin, merging]


@pytest.fixture(params=BLOCKS, ids=lambda f: f.__name__)
def block(request, lively):
    """A swapped block and an input of it: channels-last, where timm's is NCHW."""
    module, x = request.param()
    lively(module).eval()
    swap(module)
    return module, x.contiguous(memory_format=torch.channels_last) if x.shape[1] == C else x


@pytest.fixture
def warm(block):
    """As `block`, after three calls."""
    module, x = block
    call(module, x, 3)
    return block


def call(module, x, times=1):
    with torch.no_grad():
        return [module(x) for _ in range(times)][-1]


def by_timm(module, x):
    """What timm's own forward gives for the module as it is now, in float64."""
    theirs = copy.deepcopy(module)
    for child in theirs.modules():
        child.__class__ = getattr(type(child), "timm_class", type(child))
    with torch.no_grad():
        return theirs.double()(x.double())


def memos(module):
    return list(module.__dict__.get(engine_memo._NAME, {}).values())


def replays(module):
    return [made.replay for made in made_by(module) if made.replay]


def made_by(module):
    kept = (memo.kept for memo in memos(module) if memo.kept is not None)
    return [made for _, memo in kept for made in memo.prepared.values()]


def test_the_third_call_is_a_replay_and_gives_the_same_bits(block):
    module, x = block
    first = call(module, x)
    assert not replays(module)
    torch.testing.assert_close(call(module, x), first, rtol=0, atol=0)
    assert len(replays(module)) == 1
    for other in (x, x * 3 - 1, torch.zeros_like(x), x * float("nan")):
        expected = call(copy.deepcopy(module), other)
        found = call(module, other)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_a_replay_runs_no_kernel_from_python(warm, monkeypatch):
    module, x = warm
    expected = call(module, x)
    monkeypatch.setattr(native.native(), "gemm", None)
    torch.testing.assert_close(call(module, x), expected, rtol=0, atol=0)


def last_linear(module):
    return [m for m in module.modules() if isinstance(m, nn.Linear)][-1]


def with_bias(module):
    if last_linear(module).bias is None:
        pytest.skip("it has no bias")
    return last_linear(module)


def a_norm(module):
    return next(m for m in module.modules() if isinstance(m, nn.LayerNorm))


def set_child(module, kind, change):
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, kind):
                setattr(parent, name, change(child))
                return
    pytest.skip("it has no such child")


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def forward_on_the_instance(module):
    linear = last_linear(module)
    shape = (linear.out_features,)
    linear.forward = lambda x: x.new_full(x.shape[:-1] + shape, 3.0)


def other_parameter(module):
    last_linear(module).weight = nn.Parameter(torch.randn_like(last_linear(module).weight))


def same_address(module):
    """Another parameter where the one before may have lain."""
    linear = last_linear(module)
    del linear.weight
    gc.collect()
    linear.weight = nn.Parameter(torch.randn(linear.out_features, linear.in_features))


def data(change):
    def edit(module):
        weight = last_linear(module).weight
        weight.data = change(weight.data)

    return edit


def transposed(module):
    """The same memory by other strides."""
    square = [m for m in module.modules() if isinstance(m, nn.Linear) and m.weight.shape == (C, C)]
    if not square:
        pytest.skip("it has no square weight")
    square[0].weight.data = square[0].weight.data.t()


CHANGES = {
    "transposed": transposed,
    "data_assigned": data(torch.randn_like),
    "data_in_other_memory_order": data(lambda w: (3 * w).t().contiguous().t()),
    "data_mul_": lambda m: last_linear(m).weight.data.mul_(2),
    "weight_mul_": lambda m: last_linear(m).weight.detach().mul_(2),
    "bias_add_": lambda m: with_bias(m).bias.data.add_(1),
    "no_bias": lambda m: setattr(with_bias(m), "bias", None),
    "norm_weight": lambda m: a_norm(m).weight.data.mul_(2),
    "other_parameter": other_parameter,
    "same_address": same_address,
    "eps": lambda m: setattr(a_norm(m), "eps", 0.5),
    "another_class": lambda m: setattr(last_linear(m), "__class__", Doubled),
    "hook": lambda m: last_linear(m).register_forward_hook(lambda m, i, out: out * 2),
    "pre_hook": lambda m: last_linear(m).register_forward_pre_hook(lambda m, i: (i[0] * 2,)),
    "forward": forward_on_the_instance,
    "another_activation": lambda m: set_child(m, GELUS, lambda _: nn.ReLU()),
    "a_child_more": lambda m: set_child(m, GELUS, lambda act: nn.Sequential(act, nn.ReLU())),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_counts_at_once(warm, change):
    module, x = warm
    before = call(module, x)
    CHANGES[change](module)
    found, expected = call(module, x), by_timm(module, x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 1e-3 or change == "same_address"
    torch.testing.assert_close(call(module, x, 3), found, rtol=0, atol=0)


def test_training_in_between(warm):
    module, x = warm
    before = call(module, x)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        module(x).square().mean().backward()
        optimizer.step()
        found = call(module, x)
        torch.testing.assert_close(found.double(), by_timm(module, x), rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 1e-5
    assert not call(module, x, 3).requires_grad
    assert module(x).requires_grad


@pytest.mark.parametrize("change", ["shape", "dtype", "autocast", "threads", "isa", "backend"])
def test_another_kind_of_call(warm, change):
    module, x = warm
    context = contextlib.nullcontext()
    atol = 1e-4
    if change == "shape":
        x = torch.cat([x, x + 1])
    elif change == "dtype":
        module, x, atol = module.bfloat16(), x.bfloat16(), 0.3
    elif change == "autocast":
        context, atol = torch.autocast("cpu", torch.bfloat16), 0.3
    elif change == "threads":
        torch.set_num_threads(2)
    elif change == "isa":
        settings.cpu_isa = "baseline"
    else:
        settings.backend = "reference"
    before = len(made_by(module))
    with context:
        found = [call(module, x) for _ in range(4)]
        fresh = call(copy.deepcopy(module), x)
    assert len(made_by(module)) > before or change in ("dtype", "backend")
    torch.testing.assert_close(found[-1], fresh, rtol=0, atol=0)
    for one in found:
        torch.testing.assert_close(one.double(), by_timm(module, x), rtol=0, atol=atol)
        torch.testing.assert_close(one, found[0], rtol=0, atol=0)


def test_a_causal_call_has_a_replay_of_its_own(lively):
    module, x = vit()
    swap(lively(module).eval())
    plain = call(module, x, 3)
    with torch.no_grad():
        causal = [module(x, is_causal=True) for _ in range(3)]
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    with torch.no_grad():
        masked = [module(x, attn_mask=mask) for _ in range(3)]
    for one in (*causal, *masked):
        torch.testing.assert_close(one, causal[0], rtol=1e-5, atol=1e-5)
    assert (causal[0] - plain).abs().max() > 1e-3
    torch.testing.assert_close(call(module, x), plain, rtol=0, atol=0)
    assert len(replays(module)) == 2


def test_a_rotary_embedding_is_an_input_of_the_replay(lively):
    module = lively(eva.EvaBlock(C, 3, qkv_bias=False, attn_type="rope", rotate_half=True)).eval()
    swap(module)
    x, ropes = torch.randn(2, 11, C), [torch.randn(10, 2 * C // 3) for _ in range(3)]
    with torch.no_grad():
        first = [module(x, rope=rope) for rope in ropes]
        assert replays(module)
        for rope, expected in zip(ropes, first, strict=True):
            torch.testing.assert_close(module(x, rope=rope), expected, rtol=0, atol=0)
            strided = torch.stack([rope, rope], -1)[..., 0]
            found = module(x, rope=strided)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(Exception, match="rope|size|shape"):
            module(x, rope=ropes[0][:5])
    assert (first[0] - first[1]).abs().max() > 1e-3


def test_more_kinds_of_input_than_are_kept():
    module, _ = vit()
    module.eval()
    swap(module)
    inputs = [torch.randn(1, n, C) for n in range(1, 12)]
    first = [call(module, x) for x in inputs]
    for _ in range(3):
        for x, expected in zip(inputs, first, strict=True):
            torch.testing.assert_close(call(module, x, 3), expected, rtol=0, atol=0)
    assert len(made_by(module)) == engine_memo._MOST_KINDS


def test_strided_inputs_after_a_replay(warm):
    module, x = warm
    strided = torch.stack([x, x * 2], -1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(call(module, strided), call(module, x), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_recorded_now_is_later(block):
    module, x = block
    call(module, x)
    call(module, torch.stack([x, x], -1)[..., 0])

    def within_a_recording():
        native.recorder.set(native.native())
        return call(module, x)

    expected = contextvars.copy_context().run(within_a_recording)
    assert not replays(module)
    torch.testing.assert_close(call(module, x, 2), expected, rtol=0, atol=0)
    assert replays(module)


def test_results_are_tensors_of_their_own(warm):
    module, x = warm
    first = call(module, x)
    kept = first.clone()
    second = call(module, x + 1)
    assert first.data_ptr() != second.data_ptr()
    torch.testing.assert_close(first, kept, rtol=0, atol=0)


def test_copies_and_pickles_are_as_ever(warm):
    module, x = warm
    expected = call(module, x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(call(twin, x, 4), expected, rtol=0, atol=0)
        last_linear(twin).weight.data.mul_(2)
        assert (call(twin, x) - expected).abs().max() > 1e-3
        torch.testing.assert_close(call(module, x), expected, rtol=0, atol=0)


def test_no_packing_outlives_the_cache(warm, monkeypatch):
    module, x = warm
    expected = call(module, x)
    assert replays(module)
    weights_cache.clear_weight_cache()
    assert not made_by(module)
    torch.testing.assert_close(call(module, x, 3), expected, rtol=0, atol=0)
    monkeypatch.setattr(weights_cache.CACHE, "most_bytes", 1)
    packed = torch.nn.Linear(C, C).weight
    weights_cache.CACHE.get(packed, torch.float32, "test", lambda w, dtype: ())
    assert not made_by(module)


def test_the_death_of_another_module_changes_nothing(warm):
    module, x = warm
    call(copy.deepcopy(module), x, 3)
    gc.collect()
    assert replays(module)


def test_a_module_that_always_changes_goes_without():
    module, x = vit()
    module.eval()
    swap(module)
    expected = call(module, x)
    for _ in range(3 * engine_memo._MOST_VAIN):
        module.mlp.calls = object()
        torch.testing.assert_close(call(module, x), expected, rtol=0, atol=0)
    (memo,) = memos(module)
    assert memo.kept is None


def test_global_hooks_and_disable(warm):
    module, x = warm
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    try:
        call(module, x)
    finally:
        handle.remove()
    assert last_linear(module) in seen
    settings.disable = True
    found = call(module, x)
    torch.testing.assert_close(found.double(), by_timm(module, x), rtol=1e-4, atol=1e-4)


def test_threads_at_once(block):
    module, x = block
    expected = call(copy.deepcopy(module), x)
    wrong = []

    def work():
        for _ in range(30):
            if not torch.equal(call(module, x), expected):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
