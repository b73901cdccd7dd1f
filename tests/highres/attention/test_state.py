"""After a map the model is what it was: hooks, modes, classes, what is cached, what it computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vitfast
from vitfast.errors import UnsupportedInputError
from vitfast.highres import attention_map, attention_rollout

SMALL = dict(embed_dim=96, num_heads=3)


def state(model: nn.Module) -> list:
    """All that can be seen of the modules but for what is cached; tensors by identity."""
    found = []
    for name, module in model.named_modules():
        values = {
            key: (dict(value) if isinstance(value, dict) else value)
            for key, value in module.__dict__.items()
            if key != "_vitfast_memos"
        }
        tensors = (*module.parameters(), *module.buffers())
        found.append((name, type(module), values, [(id(t), t._version) for t in tensors]))
    return found


def memos(model: nn.Module) -> dict[str, list]:
    """What is cached of each module, by identity."""
    return {
        name: [(plan, entry, entry.kept, entry.vain) for plan, entry in found.items()]
        for name, module in model.named_modules()
        if (found := module.__dict__.get("_vitfast_memos")) is not None
    }


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "beit_base_patch16_224"]
)
def test_nothing_changes(name, swapped, zoo):
    model, image = zoo.make(name, **SMALL), zoo.noise()
    if swapped:
        vitfast.swap(model)
    with torch.no_grad():
        expected = [model(image) for _ in range(4)][-1]
    before, kept = state(model), memos(model)
    assert bool(kept) == swapped
    for _ in range(20):  # more often than what is kept survives being made anew
        attention_map(model, image, "all", "mean")
        attention_rollout(model, image)
    assert state(model) == before
    after = memos(model)
    for where, entries in kept.items():
        if not where.endswith(("norm1", "q_norm", "k_norm")):  # which maps call by themselves
            assert all(a is b for x, y in zip(entries, after[where], strict=True)
                       for a, b in zip(x, y, strict=True)), where  # fmt: skip
    with torch.no_grad():
        assert torch.equal(model(image), expected)


def test_training_mode_comes_back(zoo):
    model, image = zoo.make("vit_tiny_patch16_224"), zoo.noise()
    vitfast.swap(model)
    model.train()
    model.blocks[1].attn.eval()
    before = state(model)
    attention_map(model, image)
    assert state(model) == before


def test_an_error_leaves_no_hook(zoo):
    model, image = zoo.make("vit_tiny_patch16_224"), zoo.noise()
    model.train()
    before = state(model)

    def fail(*args):
        raise KeyError("theirs")

    hook = model.blocks[0].register_forward_hook(fail)
    with pytest.raises(KeyError, match="theirs"):
        attention_map(model, image)
    hook.remove()
    assert [s[:2] for s in state(model)] == [s[:2] for s in before]
    assert all(m.training and not m._forward_pre_hooks for m in model.modules())


def test_a_block_that_is_not_called_is_an_error(zoo):
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = zoo.make("vit_tiny_patch16_224", depth=3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model.forward_intermediates(x, indices=[0], stop_early=True)[0]

    assert attention_map(Half(), zoo.noise(), 0).layer == 0
    with pytest.raises(UnsupportedInputError, match=r"did not call model\.blocks\.2"):
        attention_map(Half(), zoo.noise(), [0, 2])


def test_under_inference_mode_and_checkpointing(zoo):
    model, image = zoo.make("vit_tiny_patch16_224"), zoo.noise()
    expected = attention_map(model, image, "all")
    with torch.inference_mode():
        found = attention_map(model, image, "all")
    assert all(torch.equal(a.patches, b.patches) for a, b in zip(found, expected, strict=True))
    model.set_grad_checkpointing(True)
    found = attention_map(model.train(), image, "all")
    assert all(torch.equal(a.patches, b.patches) for a, b in zip(found, expected, strict=True))


def test_compiled_models_run_plain(zoo):
    model, image = zoo.make("vit_tiny_patch16_224"), zoo.noise()
    expected = attention_map(model, image).patches
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    in_place = copy.deepcopy(model)
    in_place.compile(backend="eager")
    by_block = copy.deepcopy(model)
    for block in by_block.blocks:
        block.compile(backend="eager")
    for one in (compiled, in_place, by_block):
        with torch.no_grad():
            output = one(image)
        assert torch.equal(attention_map(one, image).patches, expected)
        assert torch.equal(
            attention_map(one, image, 0).patches, attention_map(model, image, 0).patches
        )
        with torch.no_grad():
            assert torch.equal(one(image), output)


def test_users_hooks_still_run(zoo):
    model, image = zoo.make("vit_tiny_patch16_224"), zoo.noise()
    ran = []
    model.blocks[1].register_forward_pre_hook(lambda *_: ran.append("block"))
    attention_map(model, image)
    assert ran == ["block"]
