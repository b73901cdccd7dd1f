"""RDNet's blocks beside timm's: ConvNeXt's branch to another width."""

from __future__ import annotations

import copy

import pytest
import timm.layers as tl
import torch
from timm.models import rdnet
from torch import nn

from vitfast import layers, swap
from vitfast.blocks import convnext

C, HIDDEN, WIDTH = 24, 72, 40
kinds = pytest.mark.parametrize("kind", ["Block", "BlockESE"])


def block(kind: str, norm=tl.LayerNorm2d, act=nn.GELU, sizes=(C, HIDDEN, WIDTH)) -> nn.Module:
    return getattr(rdnet, kind)(*sizes, norm_layer=norm, act_layer=act)


@kinds
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [tl.LayerNorm2d, tl.RmsNorm2d])
@pytest.mark.parametrize("act", [nn.GELU, tl.GELUTanh, nn.SiLU])
def test_block(parity, lively, kind, norm, act, autocast):
    module = lively(block(kind, norm, act))
    found = parity(module, torch.randn(3, C, 9, 11), autocast=autocast)
    assert type(found) is getattr(layers, f"RDNet{kind}")


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(parity, lively, kind, dtype):
    parity(lively(block(kind)).to(dtype), torch.randn(2, C, 8, 8, dtype=dtype))


@kinds
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 3), (31, 17)], ids=str)
def test_sizes_and_layouts(parity, lively, kind, size, layout):
    x = torch.randn(2, C, *size).to(memory_format=layout)
    parity(lively(block(kind)), x)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(C, HIDDEN, WIDTH), (C, HIDDEN, 3), (C, HIDDEN, C)], ids=str)
@pytest.mark.parametrize("shape", [(3, C, 20, 20), (2, C, 33, 31), (9, C, 9, 9)], ids=str)
def test_stripes(parity, lively, narrow_stripes, shape, sizes, autocast):
    module = lively(block("Block", sizes=sizes))
    parity(module, torch.randn(shape), backward=False, autocast=autocast)


@kinds
def test_inference_leaves_the_ops(lively, monkeypatch, kind):
    module = lively(block(kind))
    swap(module)
    monkeypatch.setattr(convnext, "_branch", None)
    with torch.no_grad():
        module(torch.randn(2, C, 8, 8))
        with torch.enable_grad(), pytest.raises(TypeError, match="NoneType"):
            module(torch.randn(2, C, 8, 8))


def strided(module: nn.Module) -> None:
    module.layers[0].stride = (2, 2)


def dilated(module: nn.Module) -> None:
    module.layers[0].dilation = (2, 2)


def grouped(module: nn.Module) -> None:
    module.layers[4] = nn.Conv2d(HIDDEN, WIDTH, 1, groups=2)


def longer(module: nn.Module) -> None:
    module.layers.insert(0, nn.ReLU())


def own_sequence(module: nn.Module) -> None:
    module.layers = type("Own", (nn.Sequential,), {})(*module.layers)


@kinds
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (strided, "strides"),
        (dilated, "strides"),
        (grouped, "no linear layer"),
        (longer, "another order"),
        (own_sequence, "another order"),
    ],
)
def test_others_are_left_to_timm(lively, kind, change, reason):
    theirs = lively(block(kind))
    change(theirs)
    ours = copy.deepcopy(theirs)
    report = swap(ours)
    assert report.counts["blocks_swapped"] == 0
    assert reason in report.skipped[0].reason
    x = torch.randn(2, C, 8, 8)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [(dict(norm=nn.BatchNorm2d), "BatchNorm2d"), (dict(act=nn.Mish), "Mish")],
    ids=str,
)
def test_other_parts_are_left_to_timm(options, reason):
    report = swap(block("Block", **options))
    assert report.counts["blocks_swapped"] == 0
    assert reason in report.skipped[0].reason


@pytest.mark.parametrize("child", [f"layers{i}" for i in ("", ".0", ".1", ".2", ".3", ".4", ".5")])
def test_hooks_are_called(lively, hook_calls, child):
    module = lively(block("BlockESE"))
    assert hook_calls(module, torch.randn(2, C, 6, 7), child) == 1


SMALL = dict(
    growth_rates=(8, 16, 16), num_blocks_list=(2, 2, 2), num_init_features=16, num_classes=10,
    block_type=("Block", "BlockESE", "BlockESE"), is_downsample_block=(None, True, False),
)  # fmt: skip


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_model(parity, lively, autocast):
    module = lively(rdnet.RDNet(**SMALL)).eval()
    found = parity(module, torch.randn(2, 3, 75, 96), autocast=autocast, fused=False)
    kinds = [type(m) for m in found.modules()]
    assert kinds.count(layers.RDNetBlock) == 2 and kinds.count(layers.RDNetBlockESE) == 4


def test_one_graph(lively, one_graph):
    module = lively(rdnet.RDNet(**SMALL)).eval()
    swap(module)
    text = one_graph(module, torch.randn(1, 3, 64, 64))
    assert text.count("vitfast.dwconv_norm.default") == 6
