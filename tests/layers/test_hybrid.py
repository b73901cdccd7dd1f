"""Convolutional stems beside timm's: weight-standardised convolutions, GroupNorm, bottlenecks."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import timm
import torch
from timm import layers as timm_layers
from timm.models import resnetv2
from torch import nn

from vitfast import layers, restore, swap
from vitfast.engine.products import conv as conv_product
from vitfast.engine.products import weights as weights_cache

LAST, FIRST = torch.channels_last, torch.contiguous_format
formats = pytest.mark.parametrize("memory_format", [LAST, FIRST], ids=["last", "first"])
lowered = pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
training = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
norm_layer = partial(timm_layers.GroupNormAct, num_groups=4)
same = partial(timm_layers.StdConv2dSame, eps=1e-8)
CONVS = {
    "pointwise": (timm_layers.StdConv2d, dict(kernel_size=1)),
    "pointwise_stride": (same, dict(kernel_size=1, stride=2)),
    "pointwise_padded": (timm_layers.StdConv2d, dict(kernel_size=1, padding=1)),
    "k3": (timm_layers.StdConv2d, dict(kernel_size=3)),
    "k3_bias": (timm_layers.StdConv2d, dict(kernel_size=3, bias=True, eps=1e-5)),
    "k3_stride": (timm_layers.StdConv2d, dict(kernel_size=3, stride=2)),
    "k3_dilated": (timm_layers.StdConv2d, dict(kernel_size=3, dilation=2)),
    "k3_groups": (timm_layers.StdConv2d, dict(kernel_size=3, groups=4)),
    "same": (same, dict(kernel_size=3)),
    "same_stride": (same, dict(kernel_size=3, stride=2)),
    "same_k7": (same, dict(kernel_size=7, stride=2, bias=True)),
    "same_uneven": (same, dict(kernel_size=(3, 1), stride=(2, 1), dilation=(2, 1))),
    "valid": (same, dict(kernel_size=3, padding="VALID")),
}
BLOCKS = {
    "plain": dict(),
    "downsample": dict(out_chs=48, proj_layer=resnetv2.DownsampleConv),
    "stride": dict(out_chs=48, stride=2, proj_layer=resnetv2.DownsampleConv),
    "average": dict(out_chs=48, stride=2, proj_layer=resnetv2.DownsampleAvg),
    "dilated": dict(dilation=2),
    "groups": dict(groups=2),
    "drop_path": dict(drop_path_rate=0.5),
}
KINDS = {"post": resnetv2.Bottleneck, "pre": resnetv2.PreActBottleneck}


def conv(name: str) -> nn.Module:
    kind, options = CONVS[name]
    return kind(16, 24, **options)


def block(name: str, kind: str = "post", **more) -> nn.Module:
    options = BLOCKS[name] | more
    options = dict(conv_layer=same, norm_layer=norm_layer) | options
    return KINDS[kind](32, bottle_ratio=0.5, **options)


def image(channels: int, size: tuple[int, int] = (9, 11), memory_format=LAST) -> torch.Tensor:
    return torch.randn(2, channels, *size).to(memory_format=memory_format)


@lowered
@formats
@pytest.mark.parametrize("size", [(9, 11), (8, 6)], ids=str)
@pytest.mark.parametrize("name", CONVS)
def test_conv(parity, lively, name, size, memory_format, autocast):
    parity(lively(conv(name)), image(16, size, memory_format), autocast=autocast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["pointwise", "same_stride"])
def test_conv_dtypes(parity, lively, name, dtype):
    parity(lively(conv(name)).to(dtype), image(16).to(dtype), backward=dtype != torch.float16)


def test_conv_of_a_channels_last_weight(parity, lively):
    parity(lively(conv("same_stride")).to(memory_format=LAST), image(16))


def test_conv_of_one_pixel(parity, lively):
    for name in ("pointwise", "k3", "same"):
        parity(lively(conv(name)), image(16, (1, 1)))


@formats
def test_memory_formats_are_torchs(lively, memory_format):
    theirs = lively(conv("same_stride"))
    ours = copy.deepcopy(theirs)
    swap(ours)
    x = image(16, memory_format=memory_format)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert ours(x).stride() == theirs(x).stride()


def test_too_small_a_map_and_wrong_channels_raise_as_in_torch(lively):
    module = nn.Sequential(conv("valid"))
    swap(module)
    for bad in (image(16, (2, 2)), image(15), image(16).half(), image(16)[0, 0]):
        with torch.no_grad(), pytest.raises(RuntimeError):
            module(bad)


@lowered
@formats
@pytest.mark.parametrize("act", [nn.ReLU, nn.Identity])
def test_group_norm_act(parity, lively, act, memory_format, autocast):
    module = timm_layers.GroupNormAct(24, num_groups=3, act_layer=act)
    parity(lively(module), image(24, memory_format=memory_format), autocast=autocast)


def test_group_norm_act_without_weights_or_act(parity):
    parity(timm_layers.GroupNormAct(24, num_groups=3, affine=False, apply_act=False), image(24))


@lowered
@formats
def test_group_norm_of_one_group(parity, lively, memory_format, autocast):
    module = timm_layers.GroupNorm1Act(24)
    parity(lively(module), image(24, memory_format=memory_format), autocast=autocast)


def test_bottleneck_with_norms_of_one_group(parity, lively):
    module = lively(block("stride", norm_layer=timm_layers.GroupNorm1Act))
    parity(module.eval(), image(32))


@pytest.mark.parametrize(
    "options", [dict(act_layer=nn.SiLU), dict(drop_layer=nn.Dropout)], ids=["silu", "dropout"]
)
def test_group_norm_act_of_other_parts_is_timms(options):
    module = nn.Sequential(timm_layers.GroupNormAct(24, num_groups=3, **options))
    report = swap(module)
    assert type(module[0]) is timm_layers.GroupNormAct and report.skipped[0].reason


def test_group_norm_act_of_vectors_is_timms():
    theirs = timm_layers.GroupNormAct(24, num_groups=3)
    ours = copy.deepcopy(theirs)
    swap(ours)
    x = torch.randn(4, 24)
    torch.testing.assert_close(ours(x), theirs(x))


@lowered
@training
@formats
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BLOCKS)
def test_bottleneck(parity, lively, name, kind, memory_format, training, autocast):
    module = lively(block(name, kind)).train(training)
    parity(module, image(32, memory_format=memory_format), autocast=autocast)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_bottleneck_dtypes(parity, lively, dtype, kind):
    parity(lively(block("stride", kind)).to(dtype), image(32).to(dtype))


def test_bottleneck_without_same_padding(parity, lively):
    parity(lively(block("stride", conv_layer=timm_layers.StdConv2d)), image(32))


def test_bottleneck_in_inference_is_fused(needs_native, lively):
    """Norms in place, with their activation and the residual; weights as they were packed."""
    module = lively(block("stride")).eval()
    swap(module)
    x = image(32)
    with torch.inference_mode():
        module(x)  # packs the weights
        with torch.profiler.profile() as profile:
            module(x)
    names = {event.key for event in profile.key_averages()}
    assert not names & {"aten::batch_norm", "aten::group_norm", "aten::conv2d", "aten::add"}


@pytest.mark.parametrize("name", ["conv2", "norm2", "downsample.conv", "act3"])
def test_a_hook_on_a_part_runs(lively, name):
    module = lively(block("stride")).eval()
    swap(module)
    seen = []
    module.get_submodule(name).register_forward_hook(lambda *args: seen.append(1))
    with torch.no_grad():
        module(image(32))
    assert seen == [1]


# ---- weights, standardised once a version --------------------------------------------------------


@pytest.fixture
def standardised(monkeypatch):
    """How often a weight was standardised."""
    count = []
    sound = conv_product.standardised

    def counted(*args):
        count.append(1)
        return sound(*args)

    monkeypatch.setattr(conv_product, "standardised", counted)
    return count


@formats
@pytest.mark.parametrize("name", ["pointwise", "same_stride"])
def test_inference_standardises_once(needs_native, lively, standardised, name, memory_format):
    module = lively(conv(name))
    swap(module)
    with torch.inference_mode():
        for size in ((9, 11), (8, 6), (16, 7)):
            module(image(16, size, memory_format))
    assert len(standardised) == 1
    module(image(16))
    assert len(standardised) == 2


CHANGES = {
    "in_place": lambda m: m.weight.mul_(torch.rand(m.weight.shape)),
    "data": lambda m: m.weight.data.copy_(torch.randn(m.weight.shape)),
    "another": lambda m: setattr(m, "weight", nn.Parameter(torch.randn(m.weight.shape))),
    "loaded": lambda m: m.load_state_dict({n: t.flip(0) for n, t in m.state_dict().items()}),
    "eps": lambda m: setattr(m, "eps", 0.5),
    "bias": lambda m: m.bias.add_(1),
    "double": lambda m: m.double(),
    "last": lambda m: m.to(memory_format=LAST),
}  # fmt: skip


@formats
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["pointwise", "same_stride"])
def test_a_changed_weight_counts_at_once(lively, name, change, memory_format):
    kind, options = CONVS[name]
    theirs = lively(kind(16, 24, **options | dict(bias=True)))
    ours = copy.deepcopy(theirs)
    swap(ours)
    x = image(16, memory_format=memory_format)
    with torch.no_grad():
        ours(x)
        torch.manual_seed(7)
        CHANGES[change](ours)
        torch.manual_seed(7)
        CHANGES[change](theirs)
        x = x.to(ours.weight.dtype)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_restore_forgets_the_weights(needs_native, lively):
    module = lively(conv("same"))
    swap(module)
    weights_cache.clear_weight_cache()
    with torch.no_grad():
        module(image(16))
    assert len(weights_cache.CACHE) == 1
    restore(module)
    assert len(weights_cache.CACHE) == 0


# ---- the embedding, and models -------------------------------------------------------------------


class Stem(nn.Sequential):
    """A small backbone."""

    def __init__(self, as_list: bool = False) -> None:
        stem = resnetv2.create_resnetv2_stem(
            3, 8, "same", preact=False, conv_layer=same, norm_layer=norm_layer
        )
        super().__init__(*stem.children())
        self.as_list = as_list

    def forward(self, x: torch.Tensor):
        return [x, super().forward(x)] if self.as_list else super().forward(x)


EMBEDS = {
    "one": dict(),
    "list": dict(backbone=partial(Stem, as_list=True)),
    "patches": dict(patch_size=2),
    "padded": dict(patch_size=3, dynamic_img_pad=True),
    "nchw": dict(output_fmt="NCHW"),
    "nhwc": dict(output_fmt="NHWC", patch_size=2),
    "nlc": dict(output_fmt="NLC"),
    "ncl": dict(output_fmt="NCL"),
    "no_proj": dict(proj=False, embed_dim=8),
    "no_bias": dict(bias=False),
}


@lowered
@pytest.mark.parametrize("name", EMBEDS)
def test_hybrid_embed(parity, lively, name, autocast):
    options = dict(img_size=(24, 32), embed_dim=20) | EMBEDS[name]
    backbone = options.pop("backbone", Stem)()
    module = lively(timm_layers.HybridEmbed(backbone, **options))
    parity(module, torch.randn(2, 3, 24, 32), autocast=autocast)


def model(name: str, **more) -> nn.Module:
    options = dict(img_size=64, depth=2, num_classes=10) | more
    return timm.create_model(name, **options)


@lowered
@pytest.mark.parametrize(
    "name, parts",
    [
        ("vit_tiny_r_s16_p8_224", {"StdConv2dSame": 1, "GroupNormAct": 1}),
        ("vit_small_r26_s32_224", {"Bottleneck": 8, "StdConv2dSame": 29, "GroupNormAct": 29}),
    ],
)
def test_model(parity, lively, name, parts, autocast):
    module = lively(model(name)).eval()
    swapped = parity(
        module, torch.randn(2, 3, 64, 64), autocast=autocast, backward=autocast is None
    )
    found = [type(m).__name__ for m in swapped.modules() if isinstance(m, layers.Layer)]
    assert {n: found.count(n) for n in parts} == parts and "HybridEmbed" in found


@pytest.mark.parametrize("size", [(64, 64), (57, 83)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_stem_of_any_size(parity, lively, size, channels):
    module = lively(model("vit_small_r26_s32_224", in_chans=channels))
    parity(module.eval().patch_embed, torch.randn(2, channels, *size), backward=False)


@pytest.mark.parametrize("name", ["", "stem", "stem.conv", "stem.norm", "stem.pool", "stages.0"])
def test_a_hook_in_the_backbone_runs(lively, name):
    module = lively(model("vit_small_r26_s32_224")).eval()
    swap(module)
    seen = []
    backbone = module.patch_embed.backbone
    backbone.get_submodule(name).register_forward_hook(lambda *args: seen.append(1))
    with torch.no_grad():
        module(torch.randn(1, 3, 64, 64))
    assert seen == [1]


PARTS = {
    "conv": lambda: (conv("same_stride"), image(16)),
    "norm": lambda: (timm_layers.GroupNormAct(24, num_groups=3), image(24)),
    "bottleneck": lambda: (block("stride"), image(32)),
    "preact": lambda: (block("stride", "pre"), image(32)),
    "embed": lambda: (
        timm_layers.HybridEmbed(Stem(), img_size=(24, 32), embed_dim=20),
        torch.randn(2, 3, 24, 32),
    ),
}


@pytest.mark.parametrize("grad", [False, True], ids=["infer", "train"])
@pytest.mark.parametrize("name", PARTS)
def test_compiles_without_a_break(lively, name, grad):
    module, x = PARTS[name]()
    x.requires_grad_(grad)
    lively(module).train(grad)
    ours = copy.deepcopy(module)
    swap(ours)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        want, got = module(x), compiled(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if grad:
        gradients = [
            # Without x, torch 2.11's group norm crashes on a channels-last map.
            torch.autograd.grad(out.square().sum(), [x, *m.parameters()])
            for out, m in ((want, module), (got, ours))
        ]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_the_model_as_timm_forward_under_a_hooked_child(lively, timm_forbidden):
    """What cannot be fused falls back part by part: the rest still runs its drop-ins."""
    module = lively(block("plain")).eval()
    swap(module)
    module.norm2.drop = nn.Dropout(0.0)
    with torch.no_grad(), timm_forbidden(timm_layers.StdConv2dSame):
        module(image(32))
