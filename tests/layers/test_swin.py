"""Blocks and attention of Swin (V1, V2) beside timm's, at sizes windows divide and others."""

from __future__ import annotations

import copy
import gc

import pytest
import timm
import torch
from timm.models import swin_transformer as v1
from timm.models import swin_transformer_v2 as v2
from timm.models import swin_transformer_v2_cr as cr

from vitfast import layers, restore, swap
from vitfast.engine import rows as by_rows
from vitfast.layers.reading.position import _KEPT

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
    "drop_path": dict(input_resolution=(8, 8), window_size=4, shift_size=2, drop_path=0.5),
}  # fmt: skip
CLASSES = {
    "v1": v1.SwinTransformerBlock,
    "v2": v2.SwinTransformerV2Block,
    "cr": cr.SwinTransformerV2CrBlock,
}
ATTENTIONS = {
    v1.WindowAttention: layers.SwinWindowAttention,
    v2.WindowAttention: layers.SwinV2WindowAttention,
    cr.WindowMultiHeadAttention: layers.SwinV2CrWindowAttention,
}
MODELS = {
    "v1": "swin_tiny_patch4_window7_224",
    "v2": "swinv2_tiny_window8_256",
    "cr": "swinv2_cr_tiny_224",
}
both = pytest.mark.parametrize("version", CLASSES)


def block(name: str, version: str = "v1", **more) -> torch.nn.Module:
    options = BLOCKS[name] | more
    if version != "cr":
        return CLASSES[version](C, num_heads=HEADS, **options)
    options["feat_size"] = options.pop("input_resolution")
    if options.pop("qkv_bias", True) is False:
        pytest.skip("always has a bias")
    window, shift = (options[n] if isinstance(options.get(n), tuple) else (options.get(n, 0),) * 2
                     for n in ("window_size", "shift_size"))  # fmt: skip
    options |= dict(window_size=window, shift_size=shift)
    if "attn_drop" in options:
        options["drop_attn"] = options.pop("attn_drop")
    return still(CLASSES[version](C, HEADS, **options))


def still(module: torch.nn.Module) -> torch.nn.Module:
    """The module without the dropout by which V2-CR varies its position biases in training."""
    for m in module.modules():
        if hasattr(m, "meta_mlp"):
            m.meta_mlp.drop1.p = 0.0
    return module


def image(name: str, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, *BLOCKS[name]["input_resolution"], C)


@both
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block(parity, lively, name, training, autocast, version):
    parity(lively(block(name, version)).train(training), image(name, 4), autocast=autocast)


def test_heads_narrower_than_the_block(parity, lively):
    parity(lively(block("shifted", head_dim=8)), image("shifted"))


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_block_dtypes(parity, lively, dtype, version):
    parity(lively(block("odd", version)).to(dtype).eval(), image("odd").to(dtype))


@both
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [50, 130, 300])
@pytest.mark.parametrize("size", [(28, 15), (29, 17), (22, 17), (24, 17)], ids=str)
def test_stripes(parity, lively, monkeypatch, size, chunk, autocast, version):
    """A map of several chunks; the last stripe wraps around its end, or lies wholly past it."""
    monkeypatch.setattr(by_rows, "CHUNK_ROWS", chunk)
    monkeypatch.setattr(by_rows, "WHOLE_ROWS", 300)
    module = block("shifted", version, input_resolution=size)
    parity(lively(module).eval(), torch.randn(2, *size, C), autocast=autocast, backward=False)


@pytest.mark.parametrize("cls", ATTENTIONS)
def test_attention_without_a_mask(parity, lively, cls):
    module = still(lively(cls(C, num_heads=HEADS, window_size=(4, 5))))
    assert type(parity(module, torch.randn(6, 20, C))) is ATTENTIONS[cls]


@pytest.mark.parametrize("cls", ATTENTIONS)
def test_attention_with_a_mask_is_timm(lively, cls):
    theirs = still(lively(cls(C, num_heads=HEADS, window_size=(4, 4))))
    ours = copy.deepcopy(theirs)
    swap(ours)
    x, mask = torch.randn(6, 16, C), torch.randn(3, 16, 16)
    torch.testing.assert_close(ours(x, mask), theirs(x, mask), rtol=1e-5, atol=1e-6)


@both
def test_dropout_of_the_attention_is_timm(lively, version):
    theirs = lively(block("shifted", version, attn_drop=0.5)).train()
    ours = copy.deepcopy(theirs)
    swap(ours)
    x = image("shifted")
    results = []
    for module in (theirs, ours):
        torch.manual_seed(3)
        results.append(module(x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def model(version="v1", **more):
    options = dict(img_size=64, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4))
    if version == "cr":
        options["window_ratio"] = None
    return still(timm.create_model(MODELS[version], **options | more, num_classes=10))


@both
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_model(parity, lively, autocast, version):
    swapped = parity(lively(model(version)).eval(), torch.randn(2, 3, 64, 64), autocast=autocast)
    stages = swapped.stages if version == "cr" else swapped.layers
    assert all(isinstance(b, layers.Layer) for stage in stages for b in stage.blocks)


@both
def test_another_size_every_call(parity, lively, version):
    module = lively(model(version, strict_img_size=False)).eval()
    for size in ((64, 64), (52, 76), (96, 40)):
        parity(module, torch.randn(1, 3, *size), backward=False)


@both
@pytest.mark.parametrize("size", [(8, 8), (8, 64), (64, 8)], ids=str)
def test_maps_of_fewer_rows_or_columns_than_the_shift(parity, lively, version, size):
    more = dict(img_size=128, window_size=8, patch_size=4, strict_img_size=False)
    parity(lively(model(version, **more)).eval(), torch.randn(1, 3, *size))


@pytest.mark.parametrize("size", [(2, 40), (1, 40), (40, 2)], ids=str)
def test_stripes_of_fewer_rows_than_the_shift(parity, lively, monkeypatch, size):
    monkeypatch.setattr(by_rows, "CHUNK_ROWS", 30)
    monkeypatch.setattr(by_rows, "WHOLE_ROWS", 30)
    module = block("shifted", always_partition=True, dynamic_mask=True)
    parity(lively(module).eval(), torch.randn(2, *size, C), backward=False)


@both
@pytest.mark.parametrize(
    "change", [dict(img_size=(96, 80)), dict(window_size=(5, 6)), dict(always_partition=True)],
    ids=str,
)  # fmt: skip
def test_sizes_set_after_the_swap(lively, change, version):
    theirs = lively(model(version, strict_img_size=False)).eval()
    ours = copy.deepcopy(theirs)
    swap(ours)
    x = torch.randn(1, 3, *change.get("img_size", (64, 64)))
    with torch.no_grad():
        ours(torch.randn(1, 3, 64, 64))  # nothing of this may be remembered
    for module in (theirs, ours):
        module.set_input_size(**change)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "version, name",
    [("v1", "relative_position_bias_table"), ("v2", "cpb_mlp.2.weight"), ("v2", "logit_scale"),
     ("v2", "q_bias"), ("cr", "meta_mlp.fc2.weight"), ("cr", "logit_scale")],
)  # fmt: skip
def test_a_changed_parameter_counts_at_once(lively, version, name):
    module = lively(block("shifted", version)).eval()
    swap(module)
    x = image("shifted")
    with torch.no_grad():
        before = module(x)
        module.attn.get_parameter(name).normal_(std=2)
        after = module(x)
        restore(module)
        torch.testing.assert_close(after, module(x), rtol=1e-4, atol=1e-5)
    assert (before - after).abs().max() > 1e-2


def test_a_table_of_another_size_is_refused_not_read(lively):
    module = lively(block("shifted")).eval()
    swap(module)
    module.attn.relative_position_bias_table = torch.nn.Parameter(torch.randn(4, HEADS))
    with torch.no_grad(), pytest.raises((ValueError, IndexError)):
        module(image("shifted"))


@both
def test_a_size_that_timm_was_not_told_of_is_refused_as_by_timm(lively, version):
    ours = lively(block("shifted", version)).eval()
    swap(ours)
    with pytest.raises(RuntimeError):
        ours(torch.randn(1, 21, 21, C))


MERGING = {"v1": v1.PatchMerging, "v2": v2.PatchMerging, "cr": cr.PatchMerging}


@both
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(8, 6), (7, 9), (1, 1), (6, 5)], ids=str)
def test_merging(parity, lively, version, size, autocast):
    module = parity(lively(MERGING[version](24)), torch.randn(2, *size, 24), autocast=autocast)
    assert isinstance(module, layers.Layer)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_merging_dtypes(parity, lively, version, dtype):
    parity(lively(MERGING[version](24)).to(dtype), torch.randn(1, 5, 6, 24, dtype=dtype))


@both
@pytest.mark.parametrize("size", [(30, 12), (13, 15)], ids=str)
def test_merging_in_chunks(parity, lively, monkeypatch, version, size):
    monkeypatch.setattr(by_rows, "CHUNK_ROWS", 20)
    monkeypatch.setattr(by_rows, "WHOLE_ROWS", 30)
    parity(lively(MERGING[version](16)).eval(), torch.randn(3, *size, 16), backward=False)


def test_position_biases_that_drop_are_timm(lively):
    theirs = lively(block("shifted", "cr")).train()
    theirs.attn.meta_mlp.drop1.p = 0.5
    ours = copy.deepcopy(theirs)
    swap(ours)
    x = image("shifted")
    results = []
    for module in (theirs, ours):
        torch.manual_seed(3)
        results.append(module(x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_the_extra_norm_of_a_block(parity, lively):
    module = parity(lively(block("shifted", "cr", extra_norm=True)), image("shifted"))
    assert isinstance(module.norm3, torch.nn.LayerNorm)


def test_a_position_mlp_with_a_hook_is_called_every_time(lively):
    module = lively(block("shifted", "v2")).eval()
    swap(module)
    calls = []
    with torch.no_grad():
        module(image("shifted"))
        module.attn.cpb_mlp[0].register_forward_hook(lambda *_: calls.append(1))
        module(image("shifted"))
        module(image("shifted"))
    assert len(calls) == 2


def test_positions_are_kept_without_autograd_only(lively):
    module = lively(block("shifted", "v2")).eval()
    swap(module)
    with torch.no_grad():
        first = module.plan(module).attn.table
        assert module.plan(module).attn.table is first
    assert module.plan(module).attn.table.requires_grad
    del module
    gc.collect()
    assert not _KEPT


@both
def test_intermediate_features(lively, version):
    theirs = lively(model(version)).eval()
    ours = copy.deepcopy(theirs)
    swap(ours)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for got, want in zip(*(m.forward_intermediates(x, output_fmt="NCHW")[1]
                               for m in (ours, theirs)), strict=True):  # fmt: skip
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@both
def test_one_graph(lively, one_graph, version):
    module = lively(model(version)).eval()
    swap(module)
    text = one_graph(module, torch.randn(1, 3, 64, 64))
    assert text.count("vitfast.window_attention.default") == 4
