"""DaViT's windowed blocks and attention beside timm's, at sizes windows divide and others."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models import davit

from vitfast import layers, swap
from vitfast.engine import rows as by_rows

C, HEADS = 32, 2
BLOCKS = {
    "plain": ((14, 14), dict(window_size=7)),
    "odd": ((13, 17), dict(window_size=7)),
    "smaller_than_a_window": ((5, 3), dict(window_size=7)),
    "rectangular": ((12, 9), dict(window_size=(4, 5))),
    "no_qkv_bias": ((9, 9), dict(window_size=4, qkv_bias=False)),
    "cpe_act": ((8, 8), dict(window_size=4, cpe_act=True)),
    "drop_path": ((8, 8), dict(window_size=4, drop_path=0.5)),
}


def block(name: str) -> torch.nn.Module:
    return davit.SpatialBlock(C, num_heads=HEADS, **BLOCKS[name][1])


def image(name: str, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, C, *BLOCKS[name][0])


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block(parity, lively, name, training, autocast):
    found = parity(lively(block(name)).train(training), image(name, 4), autocast=autocast)
    assert type(found) is layers.DavitSpatialBlock


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_block_dtypes(parity, lively, dtype):
    parity(lively(block("odd")).to(dtype).eval(), image("odd").to(dtype))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(28, 15), (29, 17), (22, 40)], ids=str)
def test_stripes(parity, lively, monkeypatch, size, autocast):
    monkeypatch.setattr(by_rows, "CHUNK_ROWS", 130)
    monkeypatch.setattr(by_rows, "WHOLE_ROWS", 300)
    module = lively(block("plain")).eval()
    parity(module, torch.randn(2, C, *size), autocast=autocast, backward=False)


def test_channels_last(parity, lively):
    x = image("odd").contiguous(memory_format=torch.channels_last)
    parity(lively(block("odd")), x)


def test_attention(parity, lively):
    module = lively(davit.WindowAttention(C, (4, 5), HEADS))
    found = parity(module, torch.randn(6, 20, C))
    assert type(found) is layers.DavitWindowAttention


def test_attention_of_another_length_is_timm(lively):
    theirs = lively(davit.WindowAttention(C, (4, 5), HEADS))
    ours = copy.deepcopy(theirs)
    swap(ours)
    x = torch.randn(6, 13, C)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("child", ["cpe1", "cpe2.proj", "attn", "attn.softmax", "mlp.fc1"])
def test_hooks_are_called(lively, child):
    theirs = lively(block("odd")).eval()
    ours = copy.deepcopy(theirs)
    swap(ours)
    ours.attn.fused_attn = theirs.attn.fused_attn = False
    calls = []
    ours.get_submodule(child).register_forward_hook(lambda *_: calls.append(1))
    x = image("odd")
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert len(calls) == 1


def test_without_an_mlp_nothing_is_swapped():
    """timm's own forward of such a block fails."""
    report = swap(davit.SpatialBlock(C, HEADS, ffn=False))
    assert report.counts["blocks_swapped"] == 0
    assert report.skipped[0].reason == "it has no MLP"


def model(**more) -> torch.nn.Module:
    options = dict(embed_dims=(24, 48), depths=(1, 1), num_heads=(2, 4), window_size=4)
    return timm.create_model("davit_tiny", **options | more, num_classes=10)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_model(parity, lively, autocast):
    module = lively(model()).eval()
    for size in ((64, 64), (52, 76)):
        swapped = parity(module, torch.randn(2, 3, *size), autocast=autocast)
    kinds = [type(m) for m in swapped.modules()]
    assert kinds.count(layers.DavitSpatialBlock) == 2


def test_sizes_set_after_the_swap(lively):
    theirs = lively(model()).eval()
    ours = copy.deepcopy(theirs)
    swap(ours)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours(x)
        for module in (ours, theirs):
            for part in module.modules():
                if isinstance(part, davit.SpatialBlock):
                    part.window_size = part.attn.window_size = (3, 5)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_one_graph(lively, one_graph):
    module = lively(model()).eval()
    swap(module)
    text = one_graph(module, torch.randn(1, 3, 64, 64))
    assert text.count("vitfast.window_attention.default") == 2
