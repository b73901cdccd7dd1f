"""Swin's block and attention beside timm's, at sizes that windows divide and at others."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention

from vitfast import layers, restore, swap

C, HEADS = 32, 2
BLOCKS = {
    "plain": dict(input_resolution=(14, 14), window_size=7),
    "shifted": dict(input_resolution=(14, 14), window_size=7, shift_size=3),
    "odd": dict(input_resolution=(13, 17), window_size=7, shift_size=3),
    "one_window": dict(input_resolution=(7, 7), window_size=7, shift_size=3),
    "always_partition": dict(
        input_resolution=(5, 6), window_size=7, shift_size=3, always_partition=True
    ),
    "rectangular": dict(input_resolution=(12, 10), window_size=(4, 5), shift_size=(2, 2)),
    "no_qkv_bias": dict(
        input_resolution=(9, 9), window_size=4, shift_size=2, qkv_bias=False
    ),
    "narrow_heads": dict(input_resolution=(8, 8), window_size=4, shift_size=2, head_dim=8),
    "drop_path": dict(input_resolution=(8, 8), window_size=4, shift_size=2, drop_path=0.5),
}  # fmt: skip


def block(name: str, **more) -> SwinTransformerBlock:
    return SwinTransformerBlock(C, num_heads=HEADS, **BLOCKS[name], **more)


def image(name: str, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, *BLOCKS[name]["input_resolution"], C)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block(parity, lively, name, training, autocast):
    parity(lively(block(name)).train(training), image(name, 4), autocast=autocast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_block_dtypes(parity, lively, dtype):
    parity(lively(block("odd")).to(dtype).eval(), image("odd").to(dtype))


def test_attention_without_a_mask(parity, lively):
    module = lively(WindowAttention(C, HEADS, window_size=(4, 5)))
    assert type(parity(module, torch.randn(6, 20, C))) is layers.SwinWindowAttention


def test_attention_with_a_mask_is_timm(lively):
    theirs = lively(WindowAttention(C, HEADS, window_size=4))
    ours = copy.deepcopy(theirs)
    swap(ours)
    x, mask = torch.randn(6, 16, C), torch.randn(3, 16, 16)
    assert torch.equal(ours(x, mask), theirs(x, mask))


def test_dropout_of_the_attention_is_timm(lively):
    theirs = lively(block("shifted", attn_drop=0.5)).train()
    ours = copy.deepcopy(theirs)
    swap(ours)
    x = image("shifted")
    results = []
    for module in (theirs, ours):
        torch.manual_seed(3)
        results.append(module(x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def model(**more):
    options = dict(img_size=64, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4))
    return timm.create_model("swin_tiny_patch4_window7_224", **options | more, num_classes=10)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_model(parity, lively, autocast):
    swapped = parity(lively(model()).eval(), torch.randn(2, 3, 64, 64), autocast=autocast)
    assert {type(b) for s in swapped.layers for b in s.blocks} == {layers.SwinTransformerBlock}


def test_another_size_every_call(parity, lively):
    module = lively(model(strict_img_size=False)).eval()
    for size in ((64, 64), (52, 76), (96, 40)):
        parity(module, torch.randn(1, 3, *size), backward=False)


@pytest.mark.parametrize(
    "change", [dict(img_size=(96, 80)), dict(window_size=(5, 6)), dict(always_partition=True)],
    ids=str,
)  # fmt: skip
def test_sizes_set_after_the_swap(lively, change):
    theirs = lively(model(strict_img_size=False)).eval()
    ours = copy.deepcopy(theirs)
    swap(ours)
    x = torch.randn(1, 3, *change.get("img_size", (64, 64)))
    with torch.no_grad():
        ours(torch.randn(1, 3, 64, 64))  # nothing of this may be remembered
    for module in (theirs, ours):
        module.set_input_size(**change)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_a_changed_table_counts_at_once(lively):
    module = lively(block("shifted")).eval()
    swap(module)
    x = image("shifted")
    with torch.no_grad():
        before = module(x)
        module.attn.relative_position_bias_table.normal_(std=2)
        after = module(x)
        restore(module)
        torch.testing.assert_close(after, module(x), rtol=1e-4, atol=1e-5)
    assert (before - after).abs().max() > 1e-2


def test_a_size_that_timm_was_not_told_of_is_refused_as_by_timm(lively):
    ours = lively(block("shifted")).eval()
    swap(ours)
    with pytest.raises(RuntimeError):
        ours(torch.randn(1, 21, 21, C))


def test_intermediate_features(lively):
    theirs = lively(model()).eval()
    ours = copy.deepcopy(theirs)
    swap(ours)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for got, want in zip(*(m.forward_intermediates(x, output_fmt="NCHW")[1]
                               for m in (ours, theirs)), strict=True):  # fmt: skip
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_one_graph(lively):
    module = lively(model()).eval()
    swap(module)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        got = torch.compile(module, fullgraph=True, backend=backend)(x)
        torch.testing.assert_close(got, module(x), rtol=1e-4, atol=1e-5)
    text = graphs[0].print_readable(print_output=False)
    assert text.count("vitfast.window_attention.default") == 4
