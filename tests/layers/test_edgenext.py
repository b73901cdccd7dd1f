"""EdgeNeXt's convolutional block beside timm's."""

from __future__ import annotations

import copy
import functools

import pytest
import timm
import torch
from timm.models import edgenext
from torch import nn

from vitfast import layers, swap

C = 24
BLOCKS = {
    "kernel_7": dict(),
    "kernel_3": dict(kernel_size=3),
    "kernel_5": dict(kernel_size=5, expand_ratio=2),
    "kernel_9": dict(kernel_size=9),
    "no_gamma": dict(ls_init_value=0.0),
    "no_bias": dict(conv_bias=False),
    "drop_path": dict(drop_path=0.5),
    "eps": dict(norm_layer=functools.partial(nn.LayerNorm, eps=1e-2)),
    "relu": dict(act_layer=nn.ReLU),
}
layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)


def block(name: str, dim: int = C, **more) -> nn.Module:
    return edgenext.ConvBlock(dim, **BLOCKS[name] | more)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block(parity, lively, name, training, autocast):
    module = lively(block(name)).train(training)
    found = parity(module, torch.randn(3, C, 9, 11), autocast=autocast)
    assert type(found) is layers.EdgeNeXtConvBlock


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["kernel_3", "kernel_9"])
def test_dtypes(parity, lively, name, dtype):
    parity(lively(block(name)).to(dtype).eval(), torch.randn(2, C, 8, 8, dtype=dtype))


@layouts
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 3), (31, 17)], ids=str)
@pytest.mark.parametrize("name", ["kernel_3", "kernel_9"])
def test_sizes_and_layouts(parity, lively, name, size, layout):
    x = torch.randn(2, 40, *size).to(memory_format=layout)
    found = parity(lively(block(name, dim=40)).eval(), x)
    assert found(x).permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, C, 20, 20), (9, C, 9, 9)], ids=str)
def test_stripes(parity, lively, narrow_stripes, shape, autocast):
    module = lively(block("kernel_9")).eval()
    parity(module, torch.randn(shape), backward=False, autocast=autocast)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(stride=2), "shortcut"),
        (dict(dim_out=2 * C), "shortcut"),
        (dict(kernel_size=4), "conv_dw"),
        (dict(norm_layer=timm.layers.LayerNormFp32), "LayerNormFp32"),
        (dict(act_layer=nn.Hardswish), "Hardswish"),
    ],
    ids=str,
)
def test_others_are_left_to_timm(options, reason):
    theirs = block("kernel_7", **options)
    ours = copy.deepcopy(theirs)
    report = swap(ours)
    assert report.counts["blocks_swapped"] == 0
    assert reason in report.skipped[0].reason


@pytest.mark.parametrize("child", ["conv_dw", "norm", "mlp", "mlp.fc1", "mlp.act", "drop_path"])
def test_hooks_are_called(lively, hook_calls, child):
    module = lively(block("kernel_3")).eval()
    assert hook_calls(module, torch.randn(2, C, 6, 7), child) == 1


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "dims", "swapped"),
    [("edgenext_xx_small", (16, 24, 32, 48), 4), ("edgenext_small_rw", (16, 32, 64, 64), 1)],
)
def test_model(parity, lively, name, dims, swapped, autocast):
    made = timm.create_model(name, depths=(1, 2, 2, 2), dims=dims, num_classes=10)
    module = lively(made).eval()
    found = parity(module, torch.randn(2, 3, 75, 96), autocast=autocast, fused=False)
    assert sum(type(m) is layers.EdgeNeXtConvBlock for m in found.modules()) == swapped
