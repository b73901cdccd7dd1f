"""Stages whose blocks write into each other's memory: the bits of blocks called one by one, and
nothing that anybody else holds is written to."""

from __future__ import annotations

import copy
import threading

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

from tests.layers.conftest import lively, recorder
from vitfast import layers, restore, swap
from vitfast.engine import convnext as engine_convnext
from vitfast.engine import donation
from vitfast.engine.products.weights import clear_weight_cache
from vitfast.settings import settings

pytestmark = pytest.mark.usefixtures("needs_native")
HIGH, WIDE = 400, 352
SWIN = dict(
    img_size=(HIGH, WIDE), embed_dim=32, depths=(3, 2, 2), num_heads=(1, 2, 4), num_classes=0
)
MODELS = {
    "swin": lambda: SwinTransformer(**SWIN),
    "swin_v2": lambda: SwinTransformerV2(**SWIN, window_size=8),
    "convnext": lambda: ConvNeXt(depths=(3, 2, 2, 1), dims=(32, 64, 96, 128), num_classes=0),
    "convnext_v2": lambda: ConvNeXt(
        depths=(2, 2, 1, 1), dims=(32, 64, 64, 64), num_classes=0, use_grn=True, ls_init_value=None
    ),
    "convnext_wide_kernel": lambda: ConvNeXt(
        depths=(2, 2, 1, 1), dims=(128, 64, 64, 64), num_classes=0, kernel_sizes=31
    ),
}
STAGES = (layers.SwinTransformerStage, layers.SwinTransformerV2Stage, layers.ConvNeXtStage)


@pytest.fixture(autouse=True)
def in_place(monkeypatch):
    """At any size, in many stripes, and nothing is replayed."""
    before, settings.memory = settings.memory, "low"
    monkeypatch.setattr(engine_convnext, "_CONVOLVED_BYTES", 1 << 16)
    clear_weight_cache()
    with torch.no_grad():
        yield
    settings.memory = before
    assert donation.given() == 0


def made(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = lively(MODELS[name]()).eval().to(dtype)
    swap(model)
    return model


def stages_of(model: nn.Module) -> nn.Sequential:
    return getattr(model, "layers", None) or model.stages


def one_by_one(model: nn.Module) -> nn.Module:
    """A copy whose stages are timm's and whose blocks are ours: each result in new memory."""
    model = copy.deepcopy(model)
    for module in [*stages_of(model), stages_of(model)]:
        module.__class__ = module.timm_class
    return model


def image(batch: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, 3, HIGH, WIDE).to(dtype)


def test_stages_are_swapped_and_restored():
    model = MODELS["swin"]()
    report = swap(model)
    kinds = [entry.layer_class for entry in report.swapped]
    assert kinds.count("vitfast.layers.SwinTransformerStage") == 3
    assert type(model.layers) is layers.Sequential
    restore(model)
    assert type(model.layers) is nn.Sequential


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_bits_are_those_of_blocks_one_by_one(name, batch):
    model, x = made(name), image(batch)
    before = x.clone()
    assert torch.equal(model(x), one_by_one(model)(x))
    assert torch.equal(x, before)


@pytest.mark.parametrize("size", [(404, 348), (131, 400), (2000, 40)])
def test_maps_of_odd_sizes(size):
    model, x = made("convnext"), torch.randn(2, 3, *size)
    assert torch.equal(model(x), one_by_one(model)(x))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_response_norm_computes_its_hidden_tensor_twice(batch, monkeypatch):
    """Instead of keeping it: the same bits, and no more than a piece of it at a time."""
    model, x = made("convnext_v2"), image(batch)
    out = model(x)
    most, respond = [], engine_convnext._respond
    settings.memory = "speed"
    assert torch.equal(model(x), out)
    settings.memory = "low"
    monkeypatch.setattr(engine_convnext, "_HIDDEN_BYTES", 1 << 18)
    monkeypatch.setattr(
        engine_convnext, "_respond", lambda h, *a: most.append(h[0].shape[0]) or respond(h, *a)
    )
    model(x)
    assert max(most) <= 512 or batch > 1  # several images' rows stay together
    assert HIGH // 4 * WIDE // 4 > 8 * 512


@pytest.mark.parametrize("name", ["swin", "swin_v2", "convnext"])
@pytest.mark.parametrize("how", ["bfloat16", "autocast", "float32 weights"])
def test_the_bits_in_other_dtypes(name, how):
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    model, x = made(name, dtype), image(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        assert torch.equal(model(x), one_by_one(model)(x))


@pytest.mark.parametrize("name", ["swin", "swin_v2", "convnext"])
def test_one_map_is_allocated_beside_the_first(name, monkeypatch):
    model, x = made(name), image()
    fresh, result = [], donation.result

    def watched(x: torch.Tensor, *args: object) -> torch.Tensor:
        out = result(x, *args)
        fresh.append(out.data_ptr() != x.data_ptr())
        return out

    monkeypatch.setattr(donation, "result", watched)
    model.forward_features(x)
    blocks = sum(len(stage.blocks) for stage in stages_of(model))
    assert len(fresh) > blocks  # and downsamplings of more than a chunk
    assert fresh[0]
    assert not any(fresh[1:5])  # the other blocks of the first stage, the merge, and one after it


@pytest.mark.parametrize("name", MODELS)
def test_what_a_caller_gives_is_not_written_to(name):
    model = made(name)
    stages = stages_of(model)
    stem = model.stem if hasattr(model, "stem") else model.patch_embed
    x = stem(image())
    before = x.clone()
    whole = stages(x)
    y = stages[0](x)
    kept = y.clone()
    z = stages[1](y)
    assert torch.equal(x, before)
    assert torch.equal(y, kept)
    for block in stages[1].blocks:
        into = z.clone(memory_format=torch.preserve_format)
        block(z)
        assert torch.equal(z, into)
    for stage in stages[2:]:
        z = stage(z)
    assert torch.equal(whole, z)


@pytest.mark.parametrize("name", MODELS)
def test_results_hold_no_more_memory_than_they_need_and_last(name):
    model, x = made(name), image()
    features = model.forward_features(x)
    assert features.untyped_storage().nbytes() == features.nbytes
    before = features.clone()
    model.forward_features(image())
    assert torch.equal(features, before)


PLACES = {
    "stage": lambda stages: stages[1],
    "blocks": lambda stages: stages[0].blocks,
    "first block": lambda stages: stages[0].blocks[0],
    "second block": lambda stages: stages[0].blocks[1],
    "downsample": lambda stages: stages[1].downsample,
    "identity": lambda stages: stages[0].downsample,
    "block after a downsample": lambda stages: stages[1].blocks[0],
    "norm of a block": lambda stages: (
        getattr(stages[0].blocks[1], "norm1", None) or stages[0].blocks[1].norm
    ),
    "mlp of a block": lambda stages: stages[0].blocks[1].mlp,
    "drop_path of a block": lambda stages: (
        getattr(stages[0].blocks[1], "drop_path1", None) or stages[0].blocks[1].drop_path
    ),
    "all stages": lambda stages: stages,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["swin", "swin_v2", "convnext"])
def test_what_a_hook_keeps_stays_what_it_was(name, place):
    model, x = made(name), image()
    expected = one_by_one(model)(x)
    module, found = PLACES[place](stages_of(model)), []
    module.register_forward_hook(recorder(found))
    out = model(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert found or (name == "swin_v2" and place == "blocks")  # which timm does not call
    assert all(torch.equal(t, then) for t, then in found)


def test_what_a_pre_hook_or_a_wrapped_forward_keeps_stays_what_it_was():
    model, x = made("swin"), image()
    expected, found = one_by_one(model)(x), []
    first, second, third = model.layers[0].blocks
    second.register_forward_pre_hook(lambda m, args: found.append((args[0], args[0].clone())))
    forward = third.forward

    def wrapped(x: torch.Tensor) -> torch.Tensor:
        y = forward(x)
        found.extend([(x, x.clone()), (y, y.clone())])
        return y

    third.forward = wrapped
    assert torch.equal(model(x), expected)
    assert len(found) == 3
    assert all(torch.equal(t, then) for t, then in found)


class Twice(nn.Module):
    """Reads its input again after a swapped block that it calls."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) + x


@pytest.mark.parametrize("name", ["swin", "swin_v2", "convnext"])
def test_modules_of_others_between_ours(name):
    model, x = made(name), image()
    blocks = stages_of(model)[0].blocks
    blocks[1] = Twice(blocks[1])
    assert torch.equal(model(x), one_by_one(model)(x))
    stages_of(model)[1].downsample = nn.Sequential(
        Twice(nn.Identity()), stages_of(model)[1].downsample
    )
    assert torch.equal(model(x), one_by_one(model)(x))


class Keeper(nn.Module):
    """Keeps what it gets, or what its block makes, beside a copy of it then."""

    def __init__(self, block: nn.Module | None = None) -> None:
        super().__init__()
        self.block, self.found = block, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x if self.block is None else self.block(x)
        self.found.append((y, y.clone()))
        return y


def _between(blocks: nn.Sequential, stage: nn.Module) -> list:
    keeper = Keeper()
    blocks.insert(1, keeper)
    return keeper.found


def _around(blocks: nn.Sequential, stage: nn.Module) -> list:
    blocks[1] = Keeper(blocks[1])
    return blocks[1].found


def _inside(blocks: nn.Sequential, stage: nn.Module) -> list:
    found: list = []
    blocks[1].register_forward_hook(recorder(found))
    blocks[1] = nn.Sequential(blocks[1])
    return found


def _derived(blocks: nn.Sequential, stage: nn.Module) -> list:
    found: list = []

    class Mine(type(blocks[1])):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            found.append((y, y.clone()))
            return y

    blocks[1].__class__ = Mine
    return found


def _after_a_downsample(blocks: nn.Sequential, stage: nn.Module) -> list:
    keeper = Keeper()
    stage.downsample = nn.Sequential(stage.downsample, keeper)
    return keeper.found


@pytest.mark.parametrize(
    "put", [_between, _around, _inside, _derived, _after_a_downsample], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("name", ["swin", "swin_v2", "convnext"])
def test_what_a_module_of_others_keeps_stays_what_it_was(name, put):
    model, x = made(name), image()
    expected, stages = one_by_one(model)(x), stages_of(model)
    found = put(stages[0].blocks, stages[1])
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert found
    assert all(torch.equal(t, then) for t, then in found)


@pytest.mark.parametrize("name", ["swin", "convnext"])
def test_transforms_of_functions(name):
    model, x = made(name), image()
    expected = one_by_one(model)(x)
    torch.testing.assert_close(torch.func.vmap(model)(x[None])[0], expected)
    with torch.enable_grad():
        ours, theirs = (
            torch.func.grad(lambda z, m=m: m(z).square().mean())(x)
            for m in (model, one_by_one(model))
        )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["swin", "convnext"])
def test_a_backward_hook_on_the_container_of_blocks_is_called(name):
    model, x = made(name), image()
    called = []
    blocks = stages_of(model)[0].blocks
    blocks.register_full_backward_hook(lambda *args: called.append(1))
    with torch.enable_grad():
        model(x).sum().backward()
    assert called


@pytest.mark.parametrize("kind", ["stage", "container"])
@pytest.mark.parametrize("name", ["swin", "swin_v2", "convnext"])
def test_a_forward_that_was_put_on_timms_class_is_called(name, kind, monkeypatch):
    model, x = made(name), image()
    stage = type(stages_of(model)[0])
    owner = stage.timm_class if kind == "stage" else nn.Sequential
    theirs, called = owner.forward, []

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        called.append(type(self))
        return theirs(self, x)

    monkeypatch.setattr(owner, "forward", forward)
    model(x)
    assert called


@pytest.mark.parametrize("name", ["swin", "swin_v2"])
def test_a_block_whose_attention_was_replaced_by_one_that_holds_a_block(name):
    model, x = made(name), image()
    block = stages_of(model)[0].blocks[2]
    inner = copy.deepcopy(stages_of(model)[0].blocks[0])
    block.norm1 = nn.Identity()  # so that it gets what the block got
    block.__dict__["_attn"] = lambda x: inner(x) + x
    assert torch.equal(model(x), one_by_one(model)(x))


@pytest.mark.parametrize("name", ["swin", "swin_v2", "convnext"])
def test_intermediates_are_all_kept(name):
    model, x = made(name), image()
    ours = model.forward_intermediates(x, intermediates_only=True)
    theirs = one_by_one(model).forward_intermediates(x, intermediates_only=True)
    assert len(ours) == len(stages_of(model))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_features_only_models():
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", features_only=True).eval()
    x = torch.randn(1, 3, 192, 160)
    expected = model(x)
    swap(model)
    for a, b in zip(model(x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_block_that_fails_leaves_nothing_given():
    model, x = made("swin"), image()
    expected = model(x)
    last = model.layers[1].blocks[1]
    handle = last.register_forward_pre_hook(lambda m, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    assert donation.given() == 0
    handle.remove()
    assert torch.equal(model(x), expected)


def test_threads_do_not_give_each_other_anything():
    model = made("convnext")
    inputs = [image() for _ in range(4)]
    expected = [model(x) for x in inputs]
    found: list[list[torch.Tensor]] = [[] for _ in inputs]

    def work(i: int) -> None:
        with torch.no_grad():
            found[i].extend(model(inputs[i]) for _ in range(3))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outs, right in zip(found, expected, strict=True):
        assert len(outs) == 3
        assert all(torch.equal(out, right) for out in outs)


@pytest.mark.parametrize("name", ["swin", "convnext"])
def test_training_and_gradient_checkpointing_are_timms(name):
    model, x = made(name), image()
    for module in model.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
    with torch.enable_grad():
        outs = []
        for checkpointing in (False, True):
            model.set_grad_checkpointing(checkpointing)
            model.zero_grad()
            model.train()(x).square().mean().backward()
            outs.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    model.eval()
    assert torch.equal(model(x), one_by_one(model)(x))
