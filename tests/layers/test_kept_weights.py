"""What inference on the CPU keeps of weights: `settings.weights`, `settings.memory`, `refresh`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from timm.models import convnext, swin_transformer_v2
from timm.models.vision_transformer import Block
from torch import nn

import vitfast
from vitfast.engine.products import weights as weights_cache
from vitfast.settings import settings

pytestmark = pytest.mark.usefixtures("needs_native")
WIDTH = 192
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "vit": (lambda: Block(WIDTH, 3), (2, 20, WIDTH), "mlp.fc1"),
    "convnext": (lambda: convnext.ConvNeXtBlock(WIDTH), (2, WIDTH, 6, 6), "mlp.fc2"),
    "swin_v2": (
        lambda: swin_transformer_v2.SwinTransformerV2Block(
            WIDTH, num_heads=6, input_resolution=(8, 8), window_size=4
        ),
        (2, 8, 8, WIDTH),
        "attn.qkv",
    ),
}


@pytest.fixture(autouse=True)
def defaults(monkeypatch):
    for name in ("weights", "memory"):
        monkeypatch.setattr(settings, name, getattr(settings, name))
    weights_cache.clear_weight_cache()
    yield
    weights_cache.clear_weight_cache()


@pytest.fixture(params=MODELS)
def warm(request, lively):
    """A swapped module that has run, its input and one of its packed weights."""
    make, shape, name = MODELS[request.param]
    ours, x = lively(make()).eval(), torch.randn(shape)
    vitfast.swap(ours)
    with torch.no_grad():
        for _ in range(4):
            ours(x)
    return ours, x, ours.get_submodule(name).weight


def one_element(weight: torch.Tensor) -> None:
    """An edit past PyTorch, off the diagonal that is looked at in every call."""
    rows, columns = len(weight), weight[0].numel()
    weight.detach().numpy().reshape(rows, columns)[rows // 2, columns // 2 + 1] += 100.0


@torch.no_grad()
def is_current(ours: nn.Module, x: torch.Tensor) -> bool:
    theirs = vitfast.restore(copy.deepcopy(ours))
    return torch.allclose(ours(x), theirs(x), rtol=1e-3, atol=1e-3)


def test_verify_sees_every_edit_at_once(warm):
    settings.weights = "verify"
    ours, x, weight = warm
    assert is_current(ours, x)
    for _ in range(3):
        one_element(weight)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no answer used an old value
            assert is_current(ours, x)


def test_frozen_looks_at_nothing_until_refreshed(warm):
    settings.weights = "frozen"
    ours, x, weight = warm
    with torch.no_grad():
        before = ours(x)
        weight.mul_(3)  # counted by PyTorch, and not looked at all the same
        assert torch.equal(ours(x), before)
        vitfast.refresh(ours)
        assert not torch.equal(ours(x), before)
    assert is_current(ours, x)


def test_refresh_drops_what_is_packed_of_this_model_alone(warm):
    ours, x, weight = warm
    settings.weights = "frozen"
    other = copy.deepcopy(ours)
    with torch.no_grad():
        for _ in range(4):
            before = other(x)
        for p in (weight, dict(zip(ours.parameters(), other.parameters(), strict=True))[weight]):
            p.mul_(1.5)
        vitfast.refresh(ours)
        assert torch.equal(other(x), before)
    assert is_current(ours, x)


def test_memory_low_keeps_nothing_and_computes_the_same(warm):
    ours, x, weight = warm
    with torch.no_grad():
        want = ours(x)
        settings.memory = "low"
        for _ in range(4):
            torch.testing.assert_close(ours(x), want, rtol=0, atol=0)
        assert len(weights_cache.CACHE) == 0
        weight.mul_(2)
    assert is_current(ours, x)
    settings.memory = "speed"
    with torch.no_grad():
        ours(x)


def test_memory_low_lets_go_what_was_kept(warm):
    ours, x, _ = warm
    kept = weights_cache.CACHE.bytes
    assert kept > 0
    settings.memory = "low"
    with torch.no_grad():
        ours(x)
    assert weights_cache.CACHE.bytes == 0


def test_refresh_takes_any_module():
    with pytest.raises(vitfast.errors.InputTypeError, match=r"expected a torch.nn.Module"):
        vitfast.refresh("model")
    vitfast.refresh(nn.Linear(3, 3))
