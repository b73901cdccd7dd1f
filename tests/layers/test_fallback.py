"""What a layer cannot know or do runs timm's forward: bitwise timm's result, nothing bypassed."""

from __future__ import annotations

import copy

import pytest
import timm
import timm.layers as tl
import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from vitfast import layers
from vitfast.settings import settings
from vitfast.swap import swap

C, HEADS, N = 48, 3, 10


@pytest.fixture
def pair(lively):
    """timm's block and its swapped twin with the same weights, which has run a few times."""
    theirs = lively(Block(C, HEADS, qkv_bias=True, init_values=0.1)).eval()
    ours = copy.deepcopy(theirs)
    swap(ours)
    with torch.no_grad():
        for _ in range(3):
            ours(torch.randn(2, N, C))
    return theirs, ours


class Lora(nn.Module):
    """A wrapped linear whose `weight` is the base's, as in PEFT."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
CHILDREN = (
    *LINEARS, "norm1", "norm2", "attn", "mlp", "ls1", "ls2", "drop_path1", "drop_path2",
    "mlp.act", "mlp.drop1", "mlp.drop2", "mlp.norm", "attn.attn_drop", "attn.proj_drop",
    "attn.norm",
)  # fmt: skip
# In its fused path timm itself does not call attn_drop.
CALLED = tuple(c for c in CHILDREN if c != "attn.attn_drop")


def replace(model: nn.Module, path: str, change) -> None:
    parent, _, name = path.rpartition(".")
    parent = model.get_submodule(parent)
    setattr(parent, name, change(getattr(parent, name)))


@pytest.mark.parametrize("path", LINEARS)
def test_wrapped_child_is_called(pair, path):
    for model in pair:
        torch.manual_seed(0)
        replace(model, path, Lora)
    theirs, ours = pair
    x = torch.randn(2, N, C)
    torch.testing.assert_close(ours(x), theirs(x))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
        ours.get_submodule(path).up.weight.zero_()
        assert (ours(x) - theirs(x)).abs().max() > 1e-3


@pytest.mark.parametrize("path", CALLED)
@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook"],
)
def test_forward_hooks_fire(pair, path, register):
    _, ours = pair
    seen = []
    x = torch.randn(2, N, C)
    with torch.no_grad():
        handle = getattr(ours.get_submodule(path), register)(lambda *args: seen.append(1))
        ours(x)
        assert seen == [1]
        handle.remove()
        ours(x)
        assert seen == [1]


def test_hook_may_change_the_output(pair):
    for model in pair:
        model.attn.qkv.register_forward_hook(lambda m, args, out: out * 0.5)
    theirs, ours = pair
    x = torch.randn(2, N, C)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("path", LINEARS)
def test_backward_hooks_fire(pair, path):
    _, ours = pair
    seen = []
    child = ours.get_submodule(path)
    child.register_full_backward_hook(lambda m, gi, go: seen.append("after"))
    child.register_full_backward_pre_hook(lambda m, go: seen.append("before"))
    ours(torch.randn(2, N, C)).sum().backward()
    assert seen == ["before", "after"]


def test_global_hook_sees_every_child(pair):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        pair[1](torch.randn(2, N, C))
    finally:
        handle.remove()
    assert {pair[1].mlp.fc1, pair[1].attn.qkv, pair[1].norm2} <= set(seen)


def test_forward_replaced_on_the_instance(pair):
    theirs, ours = pair
    for model in pair:
        linear = model.mlp.fc1
        linear.forward = lambda x, linear=linear: nn.Linear.forward(linear, x) + 1
    x = torch.randn(2, N, C)
    torch.testing.assert_close(ours(x), theirs(x))


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


@pytest.mark.parametrize("path", [*LINEARS, "norm1"])
def test_parametrization(pair, path):
    for model in pair:
        parametrize.register_parametrization(model.get_submodule(path), "weight", Doubled())
    theirs, ours = pair
    x = torch.randn(2, N, C)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("path", LINEARS)
def test_pruning(pair, path):
    for model in pair:
        prune.l1_unstructured(model.get_submodule(path), "weight", amount=0.5)
    theirs, ours = pair
    x = torch.randn(2, N, C)
    torch.testing.assert_close(ours(x), theirs(x))


class Noisy(torch.Tensor):
    """A subclass with rules of its own."""

    seen = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        Noisy.seen += func is torch.nn.functional.linear
        return super().__torch_function__(func, types, args, kwargs or {})


def test_weight_of_a_subclass(pair):
    counts = []
    for model in pair:
        model.mlp.fc1.weight = nn.Parameter(model.mlp.fc1.weight.detach().as_subclass(Noisy))
        Noisy.seen = 0
        model(torch.randn(2, N, C))
        counts.append(Noisy.seen)
    assert counts[0] == counts[1] > 0


def test_functional_call_uses_the_weights_it_is_given(pair):
    theirs, ours = pair
    weights = {n: torch.randn_like(p) * 0.1 for n, p in theirs.named_parameters()}
    x = torch.randn(2, N, C)
    expected = torch.func.functional_call(theirs, weights, x)
    torch.testing.assert_close(torch.func.functional_call(ours, weights, x), expected)


def test_per_sample_gradients(pair):
    theirs, ours = pair
    x = torch.randn(3, N, C)

    def gradients(model):
        def loss(weights, sample):
            return torch.func.functional_call(model, weights, sample[None]).square().sum()

        weights = {n: p.detach() for n, p in model.named_parameters()}
        return torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)

    torch.testing.assert_close(gradients(ours), gradients(theirs))


@pytest.mark.parametrize("make", [lambda: tl.Mlp(C), lambda: tl.LayerNorm(C)], ids=["mlp", "norm"])
def test_forward_mode(lively, make):
    theirs = lively(make())
    ours = copy.deepcopy(theirs)
    swap(ours)
    x, v = torch.randn(2, 2, N, C)
    for jvp in (lambda m: torch.func.jvp(m, (x,), (v,)), lambda m: dual(m, x, v)):
        torch.testing.assert_close(jvp(ours), jvp(theirs))


def dual(model, x, v):
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(model(forward_ad.make_dual(x, v))))


def test_flop_counter_sees_timm(pair):
    counts = []
    for model in pair:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.randn(2, N, C))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_meta_and_fake_tensors(pair):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, device="meta").eval()
    swap(model)
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(torch.empty(2, N, C))
        assert type(pair[1](x)) is type(x)


def same_bits(theirs: nn.Module, *args, training: bool = False, **kwargs) -> None:
    ours = copy.deepcopy(theirs)
    swap(ours)
    results = []
    for model in (theirs.train(training), ours.train(training)):
        torch.manual_seed(3)
        results.append(model(*args, **kwargs))
    assert torch.equal(*results)


# Options that no drop-in has and both halves of a block need: the whole of it is timm's.
UNSUPPORTED = {
    "fp32_norm": lambda: Block(C, HEADS, norm_layer=tl.LayerNormFp32),
    "both": lambda: Block(C, HEADS, act_layer=nn.Hardswish, attn_layer="diff"),
    "conv_mlp": lambda: tl.Mlp(C, use_conv=True),
    "fast_norm": lambda: fast_norm(),
}


def fast_norm() -> nn.Module:
    tl.set_fast_norm(True)
    try:
        return tl.LayerNorm(C)
    finally:
        tl.set_fast_norm(False)


@pytest.mark.timm("1.0.29")
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_option_is_timm_and_says_so(lively, name):
    module = lively(UNSUPPORTED[name]())
    shape = (2, C, 4, 4) if name == "conv_mlp" else (2, N, C)
    [entry, *_] = swap(copy.deepcopy(module)).skipped
    assert entry.path == "" and "not implemented" in entry.reason or "fast norm" in entry.reason
    for part in module.children():
        for m in part.modules():
            m.eval()
    reference = copy.deepcopy(module)
    swap(module)
    x = torch.randn(shape)
    torch.testing.assert_close(module(x), reference(x))


@pytest.mark.parametrize("option", ["attn_drop", "proj_drop"])
def test_active_dropout_is_timm(lively, option):
    theirs = lively(tl.Attention(C, HEADS, **{option: 0.5}))
    same_bits(theirs, torch.randn(2, N, C), training=True)
    same_bits(lively(tl.Mlp(C, drop=0.5)), torch.randn(2, N, C), training=True)


def test_inactive_dropout_is_fused(lively, timm_forbidden):
    ours = lively(Block(C, HEADS, attn_drop=0.5, proj_drop=0.5)).eval()
    swap(ours)
    with timm_forbidden():
        ours(torch.randn(2, N, C))


def test_in_place_layer_scale(pair):
    for model in pair:
        model.ls1.inplace = True
    theirs, ours = pair
    x = torch.randn(2, N, C)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_unfused_attention_on_request(pair):
    _, ours = pair
    ours.attn.fused_attn = False
    maps = []
    ours.attn.attn_drop.register_forward_hook(lambda m, args, out: maps.append(out))
    with torch.no_grad():
        ours(torch.randn(2, N, C))
    assert maps[0].shape == (2, HEADS, N, N)
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, HEADS, N))


def test_attention_maps_of_timm():
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32).eval()
    swap(model)
    for block in model.blocks:
        block.attn.fused_attn = False
    with torch.no_grad():
        maps = timm.utils.AttentionExtract(model, method="hook")(torch.randn(1, 3, 32, 32))
    assert [m.shape for m in maps.values()] == [(1, 3, 5, 5)] * 2


def test_mask_and_causal_together_raise_as_in_timm(pair):
    x, mask = torch.randn(2, N, C), torch.zeros(N, N)
    theirs, ours = pair
    try:
        theirs(x, attn_mask=mask, is_causal=True)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            ours(x, attn_mask=mask, is_causal=True)
    else:
        pytest.skip("this torch's SDPA takes both")


def test_scale_attribute_is_ignored_as_in_timm(pair):
    theirs, ours = pair
    theirs.attn.scale = ours.attn.scale = 100.0
    x = torch.randn(2, N, C)
    torch.testing.assert_close(ours(x), theirs(x))


def test_disable_setting(pair):
    theirs, ours = pair
    x = torch.randn(2, N, C)
    settings.disable = True
    assert torch.equal(ours(x), theirs(x))
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_wrong_input_raises(pair):
    _, ours = pair
    for shape, dtype in (((2, N, C + 1), None), ((N, C), None), ((2, N, C), torch.float64)):
        for grad in (False, True):
            with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, ValueError, TypeError)):
                ours(torch.randn(shape, dtype=dtype))


def test_layers_built_directly(lively, timm_forbidden):
    """Constructors are timm's; children may be timm's as well as drop-ins."""
    torch.manual_seed(0)
    theirs = lively(Block(C, HEADS))
    torch.manual_seed(0)
    ours = lively(layers.Block(C, HEADS))
    x = torch.randn(2, N, C)
    with timm_forbidden():
        y = ours(x)
    torch.testing.assert_close(y, theirs(x))
    model = timm.create_model("vit_tiny_patch16_224", depth=1, block_fn=layers.Block)
    assert type(model.blocks[0]) is layers.Block
