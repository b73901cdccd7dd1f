"""ConvNeXt's block beside timm's: options, strides, sizes, training, torch.compile."""

from __future__ import annotations

import pytest
import timm
import timm.layers as tl
import torch
from timm.models import convnext

from vitfast import layers, swap
from vitfast.engine import rows as by_rows

C = 24
BLOCKS = {
    "linear": dict(),
    "conv": dict(conv_mlp=True),
    "grn": dict(use_grn=True, ls_init_value=None),
    "grn_conv": dict(use_grn=True, ls_init_value=None, conv_mlp=True),
    "no_gamma": dict(ls_init_value=None),
    "no_bias": dict(conv_bias=False),
    "kernel_3": dict(kernel_size=3),
    "kernel_9": dict(kernel_size=9),
    "drop_path": dict(drop_path=0.5),
    "rms": dict(norm_layer=tl.RmsNorm),
    "rms_conv": dict(norm_layer=tl.RmsNorm2d, conv_mlp=True),
    "simple": dict(norm_layer=tl.SimpleNorm),
    "simple_conv": dict(norm_layer=tl.SimpleNorm2d, conv_mlp=True),
    "relu": dict(act_layer="relu"),
    "tanh": dict(act_layer="gelu_tanh"),
}


def block(name: str, **more) -> torch.nn.Module:
    return convnext.ConvNeXtBlock(more.pop("dim", C), **BLOCKS[name] | more)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block(parity, lively, name, training, autocast):
    module = lively(block(name)).train(training)
    found = parity(module, torch.randn(3, C, 9, 11), autocast=autocast)
    assert type(found) is layers.ConvNeXtBlock


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["linear", "conv", "grn"])
def test_dtypes(parity, lively, name, dtype):
    parity(lively(block(name)).to(dtype).eval(), torch.randn(2, C, 8, 8, dtype=dtype))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 3), (31, 17)], ids=str)
@pytest.mark.parametrize("name", ["linear", "conv", "grn_conv"])
def test_sizes_and_layouts(parity, lively, name, size, layout):
    module = lively(block(name, dim=40)).eval()
    x = torch.randn(2, 40, *size).to(memory_format=layout)
    found = parity(module, x)
    timms = block(name, dim=40).eval()
    if min(size) > 1:
        assert found(x).stride() == timms(x).stride()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(stride=2), "shortcut"),
        (dict(dilation=(1, 2)), "shortcut"),
        (dict(dilation=2), "conv_dw"),
        (dict(kernel_size=4), "conv_dw"),
        (dict(norm_layer=tl.LayerNormFp32), "LayerNormFp32"),
        (dict(act_layer="mish"), "Mish"),
    ],
    ids=str,
)
def test_others_are_left_to_timm(options, reason):
    report = swap(block("linear", **options))
    assert report.counts["blocks_swapped"] == 0
    assert reason in report.skipped[0].reason


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto", "convnext_atto_rms"])
def test_model(parity, lively, name, autocast):
    made = timm.create_model(name, depths=(1, 1, 2, 1), dims=(8, 16, 24, 40), num_classes=10)
    module = lively(made).eval()
    found = parity(module, torch.randn(1, 3, 75, 96), autocast=autocast, fused=False)
    assert sum(type(m) is layers.ConvNeXtBlock for m in found.modules()) == 5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("norm", [tl.LayerNorm2d, tl.RmsNorm2d])
def test_norms_over_channels(parity, lively, norm, layout):
    module = lively(norm(C))
    x = torch.randn(2, C, 5, 6).to(memory_format=layout)
    found = parity(module, x, fused=False)
    assert type(found) in (layers.LayerNorm2d, layers.RmsNorm2d)
    assert found(x).stride() == module(x).stride()


PATCHES = {
    "stem": lambda: [torch.nn.Conv2d(3, C, 4, 4), tl.LayerNorm2d(C)],
    "stem_without_bias": lambda: [torch.nn.Conv2d(3, C, 4, 4, bias=False), tl.RmsNorm2d(C)],
    "downsample": lambda: [tl.LayerNorm2d(3), torch.nn.Conv2d(3, C, 2, 2)],
    "downsample_rms": lambda: [tl.RmsNorm2d(3), torch.nn.Conv2d(3, C, (3, 2), (3, 2))],
}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 13, 18), (3, 3, 40, 56)], ids=str)
@pytest.mark.parametrize("name", PATCHES)
def test_patches(parity, lively, monkeypatch, name, shape, layout, autocast):
    monkeypatch.setattr(by_rows, "CHUNK_ROWS", 60)
    monkeypatch.setattr(by_rows, "WHOLE_ROWS", 100)
    module = lively(torch.nn.Sequential(*PATCHES[name]()))
    x = torch.randn(shape).to(memory_format=layout)
    found = parity(module, x, autocast=autocast)
    assert type(found) is layers.Sequential
    assert found(x).stride() == module(x.to(memory_format=torch.channels_last)).stride()


@pytest.mark.parametrize(
    "modules",
    [
        [torch.nn.Conv2d(3, C, 4, 2), tl.LayerNorm2d(C)],
        [torch.nn.Conv2d(3, C, 1), tl.LayerNorm2d(C)],
        [torch.nn.Conv2d(3, C, 4, 4), tl.LayerNorm2d(C), torch.nn.GELU()],
        [torch.nn.Linear(3, C), tl.LayerNorm2d(C)],
    ],
    ids=range(4),
)
def test_other_sequences_are_not_mentioned(modules):
    report = swap(torch.nn.Sequential(*modules))
    assert [e.timm_class for e in report.swapped] == ["LayerNorm2d"]
    assert not report.skipped


def test_patches_of_nothing_are_refused_as_by_torch():
    module = torch.nn.Sequential(*PATCHES["stem"]())
    swap(module)
    with pytest.raises(RuntimeError, match="[Kk]ernel size"):
        module(torch.randn(1, 3, 3, 8))


def test_one_graph(lively, one_graph):
    module = lively(torch.nn.Sequential(block("linear"), block("conv"))).eval()
    swap(module)
    text = one_graph(module, torch.randn(2, C, 8, 8))
    assert text.count("vitfast.dwconv_norm.default") == 2


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, C, 20, 20), (2, C, 33, 31), (9, C, 9, 9)], ids=str)
@pytest.mark.parametrize("name", ["linear", "grn_conv"])
def test_stripes(parity, lively, narrow_stripes, name, shape, autocast):
    module = lively(block(name)).eval()
    parity(module, torch.randn(shape), backward=False, autocast=autocast)
