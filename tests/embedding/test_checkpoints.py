"""Weights from a file: of a classifier, of a training script, of safetensors; or one sentence."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

import vitfast
from vitfast.errors import InputValueError


@pytest.fixture(scope="module")
def trained():
    return timm.create_model("test_vit", img_size=32, num_classes=7).state_dict()


def loaded(path, **kwargs):
    kwargs = {"img_size": 32, **kwargs}
    return vitfast.Embedder("test_vit", checkpoint=path, model_kwargs=kwargs, device="cpu")


def save(path, kind, state):
    if kind == "safetensors":
        save_file(state, path)
    else:
        wrapped = {
            "plain": state,
            "timm": {"state_dict": state, "epoch": 3},
            "ema": {"state_dict": {k: 0 * v for k, v in state.items()}, "state_dict_ema": state},
            "ddp": {f"module.{k}": v for k, v in state.items()},
        }[kind]
        torch.save(wrapped, path)
    return path


@pytest.mark.parametrize("kind", ["plain", "timm", "ema", "ddp", "safetensors"])
def test_files_of_every_kind(tmp_path, trained, kind):
    suffix = ".safetensors" if kind == "safetensors" else ".pth"
    path = save(tmp_path / f"weights{suffix}", kind, trained)
    embedder = loaded(path)
    assert embedder.metadata["source"] == {"from": "checkpoint", "checkpoint": str(path)}
    for name, value in embedder.model.state_dict().items():
        assert (value == trained[name]).all()
    assert not [name for name in embedder.model.state_dict() if name.startswith("head")]


def test_another_image_size_is_resampled_as_timm_does(tmp_path, trained):
    embedder = loaded(save(tmp_path / "w.pth", "plain", trained), img_size=64)
    assert embedder.model.pos_embed.shape[1] == 16 + 1
    assert (embedder.model.norm.weight == trained["norm.weight"]).all()


def test_files_that_do_not_do(tmp_path, trained):
    def refused(path, message):
        with pytest.raises(InputValueError, match=message) as caught:
            loaded(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    path = tmp_path / "w.pth"
    path.write_bytes(b"")
    refused(path, "cannot be read")
    path.write_bytes(b"hello")
    refused(path, "cannot be read")
    whole = save(path, "plain", trained).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "cannot be read")
    torch.save({"state_dict": {"epoch": 3}}, path)
    refused(path, "no state dict")
    torch.save(torch.nn.Linear(2, 2), path)  # a module, which is code
    refused(path, "cannot be read")
    missing = {k: v for k, v in trained.items() if k != "norm.weight"}
    refused(save(path, "plain", missing), "lacks norm.weight")
    refused(save(path, "plain", {**trained, "more": torch.ones(2)}), "has more")
    shorter = {**trained, "norm.weight": torch.ones(3)}
    refused(save(path, "plain", shorter), r"norm.weight has shape \[3\]")
    other = timm.create_model("test_convnext").state_dict()
    refused(save(path, "plain", other), "does not fit")


def test_pretrained_is_timms(tmp_path, trained, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # and back, whatever is set here
    overlay = {"file": str(save(tmp_path / "w.pth", "plain", trained)), "num_classes": 7}
    kwargs = {"img_size": 32, "pretrained_cfg_overlay": overlay}
    embedder = vitfast.Embedder("test_vit", pretrained=True, model_kwargs=kwargs, device="cpu")
    assert embedder.metadata["source"] == {"from": "pretrained"}
    for name, value in embedder.model.state_dict().items():
        assert (value == trained[name]).all()
