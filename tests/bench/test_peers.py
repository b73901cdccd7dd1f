"""Peers: what each gives, and one sentence where one cannot."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from vitfast.bench import peers, zoo
from vitfast.bench.peers import PeerUnavailableError, Setting
from vitfast.errors import InputValueError, first_line


@pytest.fixture(scope="module")
def model():
    return zoo.build("test_vit", (64, 64))


@pytest.fixture(scope="module")
def image():
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_names_are_parsed_in_order():
    assert peers.parse("openvino, eager,openvino") == ["openvino", "eager"]
    assert peers.parse("") == []
    with pytest.raises(InputValueError, match="no peer 'vitfast'; there is eager"):
        peers.parse("vitfast")


@pytest.mark.parametrize("name", ["eager", "vitfast", "onnxruntime", "openvino"])
def test_a_peer_computes_what_timm_does(name, model, image):
    if name in ("onnxruntime", "openvino") and not importlib.util.find_spec(name):
        pytest.skip(f"{name} is not installed")
    call = peers.FACTORIES[name](model, [image], Setting())
    with torch.no_grad():
        expected = model(image)
    torch.testing.assert_close(call().clone(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(call().clone(), expected, atol=1e-4, rtol=1e-4)


def test_a_model_in_which_nothing_is_swapped_is_not_timed_as_vitfast(image):
    model = zoo.build("test_resnet", (64, 64))
    with pytest.raises(PeerUnavailableError, match="^not swapped$"):
        peers.vitfast(model, [image], Setting())


@pytest.mark.slow
def test_torch_compile_computes_what_timm_does(model, image):
    call = peers.compiled(model, [image], Setting())
    with torch.no_grad():
        torch.testing.assert_close(call(), model(image), atol=1e-4, rtol=1e-4)


def test_a_compiler_that_fails_is_a_reason(model, image, monkeypatch):
    def compile(module, **options):
        def fail(*inputs):
            raise RuntimeError("no C++ compiler\nsecond line")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(PeerUnavailableError, match="^torch.compile failed: no C.. compiler$"):
        peers.compiled(model, [image], Setting())


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_packages_that_are_missing_are_a_reason(name, model, image, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(PeerUnavailableError, match=r"not installed \(pip install"):
        peers.FACTORIES[name](model, [image], Setting())


@pytest.mark.parametrize(
    "name, setting, reason",
    [
        ("onnxruntime", Setting(torch.bfloat16), "no bfloat16 in ONNX Runtime"),
        ("openvino", Setting(torch.float16), "no float16 in OpenVINO"),
        ("openvino", Setting(train=True), "inference only"),
        ("onnxruntime", Setting(device="cuda"), "on the CPU only"),
    ],
)
def test_settings_that_a_peer_cannot_serve(name, setting, reason, model, image):
    with pytest.raises(PeerUnavailableError, match=reason):
        peers.FACTORIES[name](model, [image], setting)


def test_a_copy_shares_weights_and_nothing_else(model):
    twin = peers.sharing_copy(model)
    assert twin is not model
    assert twin.blocks[0].attn is not model.blocks[0].attn
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert mine is theirs


def test_bfloat16_is_autocast(model, image):
    output = peers.eager(model, [image], Setting(torch.bfloat16))()
    assert output.dtype == torch.bfloat16
    assert next(model.parameters()).dtype == torch.float32


def test_training_gives_output_and_the_same_gradients_each_time(image):
    model = zoo.build("test_vit", (64, 64)).train()
    call = peers.eager(model, [image], Setting(train=True))
    first = [t.clone() for t in call()]
    second = call()
    assert len(first) > peers.CHECKED_GRADIENTS
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)
    assert any(t.abs().max() > 0 for t in first[1:])


def test_messages_are_cut_to_a_line():
    assert first_line(ValueError("\n\n a \n b")) == "a"
    assert first_line(ValueError("a\n  - b\n"), last=True) == "b"
    assert first_line(ValueError("")) == "ValueError"
    assert len(first_line(ValueError("x" * 999))) == 200
