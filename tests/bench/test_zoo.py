"""Models by name: sizes, names, weights that matter, and errors in plain words."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitfast.bench import zoo
from vitfast.errors import InputValueError


@pytest.mark.parametrize(
    "text, size", [("224", (224, 224)), ("2160x3840", (2160, 3840)), (" 32X64 ", (32, 64))]
)
def test_sizes(text, size):
    assert zoo.parse_img_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "224x", "x224", "2.5", "224x224x3", "9999999"])
def test_what_is_no_size(text):
    with pytest.raises(InputValueError, match="expected a size"):
        zoo.parse_img_size(text)


def test_an_unknown_model_gets_the_nearest_names():
    with pytest.raises(InputValueError, match="did you mean vit_base_patch16_224"):
        zoo.build("vit_bse_patch16_224")
    with pytest.raises(InputValueError, match="timm.list_models"):
        zoo.build("xyzzy")


def test_a_model_is_seeded_and_in_eval_mode():
    first, second, other = (
        zoo.build("test_vit", (64, 64), seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(t, second[name]) for name, t in first.items())
    assert any(not torch.equal(t, other[name]) for name, t in first.items())
    assert not zoo.build("test_vit").training


def test_a_model_without_img_size_takes_any():
    model = zoo.build("resnet10t", (96, 64))
    assert zoo.image_shape(model, (96, 64)) == (3, 96, 64)


def test_a_model_that_cannot_be_built_says_so():
    with pytest.raises(InputValueError, match="test_vit at its own size"):
        zoo.build("test_vit", num_heads=7)


def test_a_size_that_does_not_fit_is_named():
    model = zoo.build("test_vit", (160, 160))
    image = torch.zeros(1, 3, 99, 99)
    with pytest.raises(InputValueError, match="test_vit at 99x99"):
        zoo.checked_forward(model, "test_vit", image)
    with pytest.raises(InputValueError, match="test_vit on 1x3x99x99"):
        zoo.flops(model, "test_vit", [image])


def test_random_weights_have_effect():
    torch.manual_seed(0)
    model = nn.Module()
    model.gamma = nn.Parameter(torch.full((100,), 1e-5))
    model.bias = nn.Parameter(torch.zeros(100))
    model.weight = nn.Parameter(torch.randn(100))
    model.empty = nn.Parameter(torch.zeros(0))
    before = model.weight.clone()
    zoo.enliven(model)
    assert model.gamma.min() >= 0.2
    assert 0.01 < model.bias.std() < 0.04
    assert torch.equal(model.weight, before)


def test_flops_of_a_linear_layer():
    layer = nn.Linear(16, 32)
    assert zoo.flops(layer, "linear", [torch.zeros(5, 16)]) == 2 * 5 * 16 * 32
    assert layer.weight.device.type == "cpu"  # counted on a copy of its shapes


def test_weights_that_cannot_be_fetched_are_a_clear_error(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/nonexistent")
    with pytest.raises(InputValueError, match="weights of test_vit cannot be fetched"):
        zoo.build("test_vit", pretrained=True)


def test_a_model_drops_nothing_at_random():
    model = zoo.build("swin_tiny_patch4_window7_224", drop_path_rate=0.5, drop_rate=0.5).train()
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(model(x), model(x))
