"""ViT's blocks in each other's memory, and attention's result in that of q: the bits of blocks
called one by one in new memory, and nothing that anybody else holds is written to."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import timm
import torch
from timm.layers import LayerNorm
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tests.layers.conftest import lively, recorder
from tests.layers.test_naflex import GRIDS, batch_of
from vitfast import layers, restore, swap
from vitfast.engine import donation, memo, transformer
from vitfast.runtime import native
from vitfast.settings import settings

pytestmark = pytest.mark.usefixtures("needs_native")
SIZE = (400, 112)
VIT = dict(img_size=SIZE, embed_dim=48, depth=3, num_heads=2, num_classes=0, dynamic_img_size=True)
EVA = VIT | dict(use_rot_pos_emb=True, use_abs_pos_emb=False, dynamic_img_size=False)
MODELS = {
    "vit": partial(VisionTransformer, **VIT),
    "layer_scale": partial(VisionTransformer, **VIT, init_values=0.1, qk_norm=True),
    "norm_of_attention": partial(
        VisionTransformer, **VIT, scale_attn_norm=True, scale_mlp_norm=True, norm_layer=LayerNorm
    ),
    "odd_head": partial(VisionTransformer, **VIT | dict(embed_dim=44, num_heads=4)),
    "wide": partial(VisionTransformer, **VIT | dict(num_heads=1, embed_dim=96)),
    "eva": partial(Eva, **EVA),
    "eva_of_three": partial(Eva, **EVA, qkv_fused=False, swiglu_mlp=True, scale_mlp=True),
}
CHAINS = [name for name in MODELS if "eva" not in name]


@pytest.fixture(autouse=True)
def in_place(monkeypatch):
    """At any size, and nothing is replayed."""
    monkeypatch.setattr(settings, "memory", "low")
    monkeypatch.setattr(native, "LARGE", 1)
    with torch.no_grad():
        yield
    assert donation.given() == 0


def made(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = lively(MODELS[name]()).eval().to(dtype)
    swap(model)
    return model


def image(batch: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, 3, *SIZE).to(dtype)


def in_new_memory(model: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """What the model gives where timm's Sequential calls our blocks, and each allocates."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is layers.Sequential:
            module.__class__ = nn.Sequential
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "_room", lambda q: torch.empty(q.shape, dtype=q.dtype))
        return model(*inputs)


def test_blocks_are_swapped_and_restored():
    model = MODELS["vit"]()
    report = swap(model)
    assert type(model.blocks) is layers.Sequential
    assert sum(entry.layer_class == "vitfast.layers.Block" for entry in report.swapped) == 3
    restore(model)
    assert type(model.blocks) is nn.Sequential


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_the_bits_are_those_in_new_memory(name, batch):
    model, x = made(name), image(batch)
    before = x.clone()
    assert torch.equal(model(x), in_new_memory(model, x))
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["layer_scale", "norm_of_attention", "odd_head", "eva"])
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_the_bits_in_other_dtypes(name, how):
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    model, x = made(name, dtype), image(2, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        assert torch.equal(model(x), in_new_memory(model, x))


@pytest.mark.parametrize("name", MODELS)
def test_the_bits_in_chunks(name, monkeypatch):
    monkeypatch.setattr(transformer.by_rows, "WHOLE_ROWS", 64)
    monkeypatch.setattr(transformer.by_rows, "CHUNK_ROWS", 48)
    model, x = made(name), image(2)
    assert torch.equal(model(x), in_new_memory(model, x))


@pytest.mark.parametrize("name", ["vit", "eva"])
def test_the_bits_of_calls_that_are_replayed(name, monkeypatch):
    monkeypatch.setattr(settings, "memory", "speed")
    model, x, replays, record = made(name), image(), [], memo.record

    def watched(*args: object) -> object:
        found = record(*args)
        replays.append(found[1])
        return found

    monkeypatch.setattr(memo, "record", watched)
    expected = in_new_memory(model, x)
    for _ in range(5):
        assert torch.equal(model(x), expected)
    assert replays.count(None) <= 1  # the patch embedding's may be oneDNN's
    assert len(replays) >= 3


@pytest.mark.parametrize("token_mask", [False, True])
def test_masks_and_causal_blocks(token_mask):
    block = made("vit").blocks[1]
    x = torch.randn(2, 33, 48)
    mask = torch.rand(2, 1, 33, 33) > 0.3 if token_mask else None
    options = dict(attn_mask=mask) if token_mask else dict(is_causal=True)
    before = x.clone()
    out = block(x, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "_room", torch.empty_like)
        assert torch.equal(block(x, **options), out)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", MODELS)
def test_attention_writes_over_q(name, monkeypatch):
    rooms, room = [], transformer._room

    def watched(q: torch.Tensor) -> torch.Tensor:
        found = room(q)
        rooms.append(found is q)
        return found

    monkeypatch.setattr(transformer, "_room", watched)
    made(name)(image())
    assert rooms == [True] * 3


@pytest.mark.timm("1.0.29")
@pytest.mark.parametrize("rope", [None, "axial"])
def test_packed_sequences(rope):
    options = dict(depth=2, embed_dim=48, num_heads=3, num_classes=20)
    if rope:
        options["rope_type"] = rope
    model = lively(timm.create_model("naflexvit_base_patch16_gap", **options)).eval()
    swap(model)
    batch = batch_of(GRIDS)
    assert torch.equal(model(batch), in_new_memory(model, batch))


@pytest.mark.parametrize("name", CHAINS)
def test_one_stream_is_allocated_beside_the_first(name, monkeypatch):
    model, fresh, result = made(name), [], donation.result

    def watched(x: torch.Tensor, *args: object) -> torch.Tensor:
        out = result(x, *args)
        fresh.append(out.data_ptr() != x.data_ptr())
        return out

    monkeypatch.setattr(donation, "result", watched)
    model(image())
    assert fresh == [True, False, False]


PLACES = {
    "blocks": lambda m: m.blocks,
    "first block": lambda m: m.blocks[0],
    "second block": lambda m: m.blocks[1],
    "norm1": lambda m: m.blocks[1].norm1,
    "attention": lambda m: m.blocks[1].attn,
    "qkv": lambda m: m.blocks[1].attn.qkv,
    "projection": lambda m: m.blocks[1].attn.proj,
    "norm2": lambda m: m.blocks[1].norm2,
    "mlp": lambda m: m.blocks[1].mlp,
    "drop_path": lambda m: m.blocks[1].drop_path1,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["vit", "layer_scale"])
def test_what_a_hook_keeps_stays_what_it_was(name, place):
    model, x = made(name), image()
    expected, found = in_new_memory(model, x), []
    PLACES[place](model).register_forward_hook(recorder(found))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert found
    assert all(torch.equal(t, then) for t, then in found)


def test_what_a_caller_gives_is_not_written_to():
    model = made("vit")
    x = torch.randn(2, 40, 48)
    before = x.clone()
    model.blocks(x)
    assert torch.equal(x, before)
    y = model.blocks[0](x)
    kept = y.clone()
    model.blocks[1](y)
    assert torch.equal(y, kept)
    features = model.forward_intermediates(image(), indices=3, intermediates_only=True)
    copies = [f.clone() for f in features]
    model(image())
    assert all(torch.equal(f, c) for f, c in zip(features, copies, strict=True))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_a_derived_block_keeps_stays_what_it_was(place):
    model, x = made("vit"), image()
    expected, found = in_new_memory(model, x), []

    class Keeping(layers.Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            found.extend([(x, x.clone()), (y, y.clone())])
            return y

    model.blocks[place].__class__ = Keeping
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert len(found) == 2
    assert all(torch.equal(t, then) for t, then in found)


HOOK_RESULTS = {
    "tuple": lambda y: (y,),
    "dict": lambda y: {"tokens": y},
    "sparse": lambda y: y.to_sparse(),
    "view": lambda y: y[:, 1:],
    "None": lambda y: None,
}


@pytest.mark.parametrize("what", HOOK_RESULTS)
def test_what_a_hook_makes_of_the_last_result_is_returned_as_it_is(what):
    """Its very object, whatever it is: who called the blocks may know what to do with it."""
    model, made_by_hook = made("vit"), []

    def hook(module: nn.Module, inputs: object, output: torch.Tensor) -> object:
        made_by_hook.append(HOOK_RESULTS[what](output))
        return made_by_hook[-1]

    model.blocks[-1].register_forward_hook(hook)
    out = model.blocks(torch.randn(1, 9, 48))
    assert out is made_by_hook[0] or what == "None"


@pytest.mark.parametrize("memory", ["low", "speed"])
def test_a_sparse_input_that_a_hook_makes_dense(memory, monkeypatch):
    monkeypatch.setattr(settings, "memory", memory)
    model, x = made("vit"), torch.randn(1, 9, 48)
    expected = model.blocks(x)
    model.blocks[0].register_forward_pre_hook(lambda _, args: (args[0].to_dense(),))
    assert torch.equal(model.blocks(x.to_sparse()), expected)
