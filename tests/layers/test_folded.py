"""Stems with BatchNorm in CPU inference: folded into their convolutions."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import timm
import torch
from timm import layers as timm_layers
from timm.models import resnet
from timm.models import vision_transformer_hybrid as hybrid
from torch import nn

from vitfast import swap
from vitfast.engine.products import onednn

lowered = pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)


def features(**options) -> nn.Module:
    """A small ResNet-D of bottlenecks as timm builds it for a hybrid."""
    options = (
        dict(block="bottleneck", layers=(1, 2), channels=(8, 12), stem_width=8, stem_type="deep")
        | dict(avg_down=True, features_only=True, out_indices=(-1,))
        | options
    )
    options["block"] = {"bottleneck": resnet.Bottleneck, "basic": resnet.BasicBlock}[
        options["block"]
    ]
    return timm.models.build_model_with_cfg(resnet.ResNet, "test_folded", False, **options)


def stem(**options) -> nn.Module:
    """MobileCLIP's."""
    options = dict(channels=(8, 12, 20), kernel_size=(4, 2, 2), stride=(4, 2, 2)) | options
    return hybrid.ConvStem(**dict(padding=0, act_layer=nn.GELU) | options)


BACKBONES = {
    "resnet_d": features,
    "strided": partial(features, avg_down=False, stem_type=""),
    "replaced_pool": partial(features, replace_stem_pool=True),
    "dilated": partial(features, layers=(1, 1, 1), channels=(8, 12, 16), output_stride=8),
    "groups": partial(features, cardinality=2, base_width=32),
    "clip": stem,
    "clip_relu": partial(stem, act_layer=nn.ReLU),
    "overlapping": partial(stem, kernel_size=3, stride=(2, 2, 2), padding=1),
}
OTHERS = {
    "basic": partial(features, block="basic"),
    "gated": partial(features, block_args=dict(attn_layer="se")),
    "blurred": partial(features, aa_layer=timm_layers.BlurPool2d),
    "silu": partial(features, act_layer=nn.SiLU),
    "clip_silu": partial(stem, act_layer=nn.SiLU),
    "clip_same": partial(stem, kernel_size=3, stride=(2, 2, 2), padding="same"),
    "clip_group_norm": partial(stem, norm_layer=partial(timm_layers.GroupNormAct, num_groups=2)),
    "images": nn.Identity,
}


@pytest.fixture
def embed(lively):
    """embed(backbone): a HybridEmbed of it, in eval mode, with statistics that matter."""

    def build(backbone: nn.Module) -> nn.Module:
        torch.manual_seed(3)
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.5)
                module.running_var.uniform_(0.3, 3)
        module = timm_layers.HybridEmbed(backbone, img_size=(64, 48), embed_dim=20)
        return lively(module).eval()

    return build


@pytest.fixture
def folded(monkeypatch, refusal):
    """folded(module, x): its inference, in which no norm of a batch may run."""

    def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(torch.nn.functional, "batch_norm", refusal("a norm was not folded"))
            return module(x)

    return run


def image(height: int = 64, width: int = 48, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, height, width)


@lowered
@pytest.mark.parametrize("name", BACKBONES)
def test_parity(parity, embed, needs_native, folded, name, autocast):
    swapped = parity(embed(BACKBONES[name]()), image(), autocast=autocast)
    folded(swapped, image())


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_folded_computes_as_timm_does(parity, embed, name):
    parity(embed(OTHERS[name]()), image(), fused=False)


@pytest.mark.parametrize("size", [(33, 57), (7, 90), (1, 1)], ids=str)
@pytest.mark.parametrize("name", ["resnet_d", "overlapping"])
def test_maps_of_any_size(parity, embed, name, size):
    module = embed(BACKBONES[name]())
    module.strict_img_size = False
    parity(module, image(*size), backward=False)


@pytest.mark.parametrize("name", ["resnet_d", "clip", "clip_relu"])
def test_what_is_not_a_number_stays_none(embed, name):
    theirs = embed(BACKBONES[name]())
    ours = copy.deepcopy(theirs)
    swap(ours)
    x = image()
    x[1, 0, 5, 7] = float("nan")
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4, equal_nan=True)


def test_bfloat16_weights(embed, folded):
    theirs = embed(features())
    ours = copy.deepcopy(theirs)
    swap(ours)
    exact = theirs(image_ := image())
    x = image_.bfloat16()
    # Without bfloat16 in oneDNN PyTorch's convolutions and norms run.
    got = folded(ours.bfloat16(), x) if onednn._bfloat16() else ours.bfloat16()(x)
    base = theirs.bfloat16()(x)
    error, limit = ((t - exact).norm() for t in (got, base))
    assert got.dtype == torch.bfloat16 and error < 1.5 * limit


def test_training_keeps_the_statistics_of_batches(embed):
    theirs = embed(features()).train()
    ours = copy.deepcopy(theirs)
    swap(ours)
    x = image()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert (ours.backbone.bn1.running_mean != embed(features()).backbone.bn1.running_mean).all()


def test_what_counts_batches_does_so_once(embed):
    """Even where a later step turns out to be none to fold."""
    chain = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
    )
    module = embed(chain)
    swap(module)
    chain[2].train()
    chain[3].half()
    with torch.no_grad(), pytest.raises(RuntimeError):
        module(image())
    assert chain[2].num_batches_tracked == 1


CHANGES = {
    "mean": lambda m: m.bn2.running_mean.add_(1),
    "var": lambda m: m.bn2.running_var.mul_(3),
    "weight": lambda m: m.bn2.weight.data.mul_(-2),
    "bias": lambda m: m.bn2.bias.add_(1),
    "eps": lambda m: setattr(m.bn2, "eps", 0.5),
    "another": lambda m: setattr(m.bn2, "weight", nn.Parameter(torch.rand(m.bn2.weight.shape))),
    "convolution": lambda m: m.conv2.weight.mul_(2),
    "last_norm": lambda m: m.bn3.bias.add_(1),
    "batch_statistics": lambda m: m.bn2.train(),
    "activation": lambda m: setattr(m, "act1", nn.SiLU()),
    "no_activation": lambda m: setattr(m, "act2", nn.Identity()),
    "drop_path": lambda m: setattr(m, "drop_path", timm_layers.DropPath(1.0, scale_by_keep=False)),
    "gate": lambda m: setattr(m, "se", timm_layers.SEModule(m.bn3.num_features)),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_counts_at_once(embed, change):
    theirs = embed(features())
    ours = copy.deepcopy(theirs)
    swap(ours)
    x = image()
    with torch.no_grad():
        before = ours(x)
        for module in (ours, theirs):
            torch.manual_seed(7)
            CHANGES[change](module.backbone.layer2[1])
        want = theirs(x)
        assert not torch.allclose(before, want, rtol=1e-3)
        torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    ["", "conv1", "conv1.0", "bn1", "act1", "maxpool", "layer2", "layer2.0", "layer2.1.conv2",
     "layer2.1.bn3", "layer2.1.act3", "layer2.0.downsample", "layer2.0.downsample.1"],
)  # fmt: skip
def test_a_hook_runs(embed, name):
    module = embed(features())
    swap(module)
    seen = []
    module.backbone.get_submodule(name).register_forward_hook(lambda *args: seen.append(1))
    with torch.no_grad():
        module(image())
    assert seen == [1]


def test_gradients_of_frozen_convolutions_with_trained_norms(embed):
    """What autograd records runs by modules, whichever of the two wants it."""
    module = embed(features())
    swap(module)
    for name, p in module.named_parameters():
        p.requires_grad_(name.endswith("bn3.weight"))
    module(image()).sum().backward()
    assert module.backbone.layer2[1].bn3.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["vit_small_resnet26d_224", "vit_base_mci_224"])
def test_models(parity, lively, folded, needs_native, name):
    """The report says when their norms are PyTorch's."""
    module = timm.create_model(name, img_size=64, depth=2, num_classes=10)
    swapped = parity(lively(module).eval(), torch.randn(1, 3, 64, 64), backward=False)
    folded(swapped, torch.randn(1, 3, 64, 64))
    reasons = {e.reason for e in swap(swapped).skipped if e.path.startswith("patch_embed")}
    assert len(reasons) == 1 and "inference on the CPU" in reasons.pop()
