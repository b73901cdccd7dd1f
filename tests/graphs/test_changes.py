"""A graphed model that changes: its weights, modules, hooks and class; its copies."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vitfast
from vitfast.errors import InputTypeError, InputValueError
from vitfast.graphs import beneath, explain, guard
from vitfast.runtime import native

pytestmark = [
    pytest.mark.filterwarnings("error::RuntimeWarning"),
    pytest.mark.usefixtures("no_grad"),
]


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=["extension", "python"])
def either_guard(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(guard.native, "extension", lambda: None)
    elif native.extension() is None:
        pytest.skip("no native extension")


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=2, num_classes=10,
    ).eval()  # fmt: skip


def captured() -> VisionTransformer:
    model = vitfast.graphed(vit())
    for _ in range(2):
        model(images())
    return model


def right(model: nn.Module, seed: int = 0) -> bool:
    """Whether a call gives what the model's own method does."""
    got, want = model(images(seed)), beneath(type(model)).forward(model, images(seed))
    return torch.equal(got, want)


def _load(model, **options):
    model.load_state_dict({k: v + 0.5 for k, v in model.state_dict().items()}, **options)


def _optimizer_step(model):
    with torch.enable_grad():
        beneath(type(model)).forward(model, images()).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()


VALUES = {
    "in place": lambda m: m.head.weight.mul_(3),
    "loaded": _load,
    "optimizer step": _optimizer_step,
    "through data": lambda m: m.head.weight.data.mul_(3),
    "through NumPy": lambda m: m.head.weight.numpy().__imul__(3),
}


@pytest.mark.usefixtures("either_guard")
@pytest.mark.parametrize("how", VALUES)
def test_new_values_of_weights_are_replayed(fake, how):
    model = captured()
    before = model(images())
    VALUES[how](model)
    replays = fake.count("replay")
    assert right(model) and not torch.equal(model(images()), before)
    assert fake.count("replay") == replays + 2 and fake.count("capture") == 1


def _another_block(model):
    model.blocks[1] = copy.deepcopy(model.blocks[0])


def _patched_forward(model):
    own = model.head.forward
    model.head.forward = lambda x: own(x) + 1


def _hooked(model):
    model.blocks[0].mlp.register_forward_hook(lambda m, args, out: out + 1)


def _strides(model):
    weight = model.blocks[0].attn.proj.weight
    weight.data = weight.data.t()


def _functional(model):
    named = {k: v + 1 for k, v in model.state_dict().items()}
    got = torch.func.functional_call(model, named, images())
    other = vitfast.ungraphed(copy.deepcopy(model))
    other.load_state_dict(named)
    assert torch.equal(got, other(images()))
    model.head = nn.Identity()  # so that something stays changed


CHANGES = {
    "data": lambda m: setattr(m.head.weight, "data", m.head.weight.data + 1),
    "a new parameter": lambda m: setattr(m.head, "weight", nn.Parameter(m.head.weight + 1)),
    "loaded by assignment": lambda m: _load(m, assign=True),
    "strides alone": _strides,
    "a child of another class": lambda m: setattr(m, "head", nn.Identity()),
    "a child of the same class": _another_block,
    "an attribute": lambda m: setattr(m.blocks[0].norm1, "eps", 0.5),
    "an option of the model": lambda m: setattr(m, "global_pool", "avg"),
    "a forward": _patched_forward,
    "a hook": _hooked,
    "functional call": _functional,
    "reset": lambda m: m.reset_classifier(5),
    "double": lambda m: m.double().float().head.weight.add_(1),
}


@pytest.mark.usefixtures("either_guard")
@pytest.mark.parametrize("how", CHANGES)
def test_a_changed_model_is_not_replayed(fake, how):
    model = captured()
    assert right(model)
    stale = model(images())
    replays = fake.count("replay")
    CHANGES[how](model)
    for seed in range(3):
        assert right(model, seed)
    assert fake.count("replay") <= replays + 2  # of which none was handed out
    assert not torch.equal(model(images()), stale)
    for _ in range(6):
        assert right(model)
    if how not in ("a hook", "a forward"):
        assert fake.count("capture") == 2 and model(images()) is not None
    gc.collect()
    assert len(fake.graphs) <= 1


@pytest.mark.parametrize("how", [h for h in CHANGES if h not in ("reset", "double")])
def test_without_the_guard_it_would_be_wrong(fake, how, monkeypatch):
    """The device above does show results of what the model was, so that its tests can fail."""
    monkeypatch.setattr(guard.Guard, "is_same", lambda self, module: True)
    monkeypatch.setattr(guard.Guard, "is_in_place", lambda self: True)
    model = captured()
    if how == "functional call":
        with pytest.raises(AssertionError):
            CHANGES[how](model)
    else:
        CHANGES[how](model)
        assert not right(model)


def test_a_hook_is_called_and_its_removal_noticed(fake):
    model = captured()
    seen = []
    handle = model.blocks[0].register_forward_hook(lambda *args: seen.append(1))
    for _ in range(5):
        model(images())
    assert len(seen) == 5 and "blocks.0 has a forward hook" in explain(model)
    handle.remove()
    replays = fake.count("replay")
    for _ in range(20):
        assert right(model)
    assert fake.count("replay") > replays + 1


def test_the_models_own_hook_runs_around_a_replay(fake):
    model = captured()
    model.register_forward_hook(lambda m, args, out: out + 1)
    for _ in range(6):
        model(images())
    replays = fake.count("replay")
    got = model(images())
    assert fake.count("replay") == replays + 1
    assert torch.equal(got, beneath(type(model)).forward(model, images()) + 1)


def test_a_part_in_training_mode(fake):
    model = captured()
    model.blocks[0].train()
    replays = fake.count("replay")
    for _ in range(4):
        assert right(model)
    assert fake.count("replay") <= replays + 1
    assert "blocks.0 is in training mode" in explain(model)


def test_a_new_head_need_not_be_in_evaluation_mode(fake):
    model = vit()
    model.head = nn.Sequential(nn.Linear(32, 4), nn.Dropout(0.5))
    vitfast.graphed(model)
    model.head[1].eval()
    for seed in range(3):
        assert right(model, seed)
    assert fake.count("replay") == 2
    model.head[1].train()
    assert not torch.equal(model(images()), model(images())) and fake.count("capture") == 1


def test_swap_and_restore_are_noticed(fake):
    model = captured()
    for change in (vitfast.swap, vitfast.restore):
        change(model)
        replays = fake.count("replay")
        model(images())
        assert fake.count("replay") == replays + 1  # found to be stale, and not handed out
        for seed in range(20):
            torch.testing.assert_close(
                model(images(seed)), beneath(type(model)).forward(model, images(seed)),
                rtol=1e-5, atol=1e-5,
            )  # fmt: skip
        assert fake.count("replay") > replays + 1
    assert type(model) is not VisionTransformer and type(vitfast.ungraphed(model)) is type(vit())


def test_a_graphed_block_is_swapped_and_restored(fake):
    block = vitfast.graphed(vit().blocks[0])
    x = torch.randn(2, 5, 32)
    want = block(x)
    vitfast.swap(block)
    assert beneath(type(block)) is vitfast.layers.Block
    for _ in range(3):
        torch.testing.assert_close(block(x), want, rtol=1e-5, atol=1e-5)
    assert fake.count("replay") == 3
    vitfast.restore(block)
    assert beneath(type(block)) is type(vit().blocks[0]) and block is not None
    assert torch.equal(block(x), want)


def test_refresh_forgets_graphs(fake):
    model = captured()
    vitfast.refresh(model)
    assert len(fake.graphs) == 0 and right(model)


def test_moving_the_weights_lets_go_of_their_memory(fake):
    model = captured()
    old = weakref.ref(model.head.weight.untyped_storage())
    model.double()
    gc.collect()
    assert len(fake.graphs) == 0 and old() is None


def test_a_model_that_dies_takes_its_graphs_with_it(fake):
    model = captured()
    assert len(fake.graphs) == 1
    gc.disable()
    try:
        del model
        assert len(fake.graphs) == 0
    finally:
        gc.enable()


def test_a_model_that_changes_in_every_call_is_not_captured_in_every_call(fake):
    model = captured()
    for _ in range(100):
        model(images())
        model.head.weight.data = model.head.weight.data.clone()
    assert fake.count("capture") <= 5


def test_nothing_about_the_model_shows(fake):
    model, other = captured(), vit()
    assert isinstance(model, VisionTransformer) and repr(model) == repr(other)
    assert list(model.state_dict()) == list(other.state_dict())
    assert inspect.signature(model.forward) == inspect.signature(other.forward)
    assert type(model).__name__ == "VisionTransformer" and type(model).__doc__ == other.__doc__
    other.load_state_dict(model.state_dict(), strict=True)
    assert vitfast.ungraphed(model) is model and type(model) is VisionTransformer
    assert "_vitfast_graphs" not in vars(model)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize("how", COPIES)
def test_copies_have_graphs_of_their_own(fake, how):
    model = captured()
    want = model(images())
    twin = COPIES[how](model)
    assert type(twin) is type(model)
    captures = fake.count("capture")
    twin.head.weight.add_(1)
    for _ in range(3):
        assert right(twin)
    assert fake.count("capture") == captures + 1
    assert torch.equal(model(images()), want)


def test_a_shallow_copy_is_not_taken_for_the_model(fake):
    """Nor a replica of DataParallel, which is one."""
    model = captured()
    twin = copy.copy(model)
    twin._modules = {**model._modules, "head": nn.Identity()}
    log = list(fake.log)
    for _ in range(3):
        assert right(twin) and twin(images()).shape[-1] == 32
    assert fake.log == log and right(model)


def test_graphed_again_takes_the_new_options(fake):
    model = captured()
    vitfast.graphed(model, limit=1, methods="forward_features")
    assert len(fake.graphs) == 0 and beneath(type(model)) is VisionTransformer
    for _ in range(3):
        model.forward_features(images())
    assert fake.count("capture") == 2


def test_a_model_in_a_wrapper(fake):
    wrapped = nn.DataParallel(vit())
    assert vitfast.graphed(wrapped) is wrapped
    for _ in range(3):
        wrapped.module(images())
    assert fake.count("replay") == 2 and "a graph" in explain(wrapped)


BAD = {
    "no module": (lambda: vitfast.graphed(3), InputTypeError, "torch.nn.Module"),
    "compiled": (lambda: vitfast.graphed(torch.compile(vit())), InputTypeError, "reduce-overhead"),
    "limit": (lambda: vitfast.graphed(vit(), limit=0), InputValueError, "limit is 0"),
    "warm_up": (lambda: vitfast.graphed(vit(), warm_up=1.5), InputValueError, "warm_up is 1.5"),
    "method": (lambda: vitfast.graphed(vit(), methods=["f"]), InputValueError, "no method 'f'"),
    "no method": (lambda: vitfast.graphed(vit(), methods=()), InputValueError, "names none"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments(what):
    call, error, message = BAD[what]
    with pytest.raises(error, match=message):
        call()


def test_a_forward_of_the_instance_would_hide_the_graphs():
    model = vit()
    model.forward = model.forward
    with pytest.raises(InputValueError, match="replaced on the instance"):
        vitfast.graphed(model)
    assert type(model) is VisionTransformer
