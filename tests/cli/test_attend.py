"""`vitfast attend`: overlays, their colours, and what is refused before anything is written."""

from __future__ import annotations

import os

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vitfast.bench import zoo
from vitfast.highres import AttentionMap, attention_map
from vitfast.highres.attention.overlay import overlay
from vitfast.highres.pictures import picture_input


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "in.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(float)


def test_an_overlay(vitfast, picture, tmp_path):
    out = tmp_path / "out.png"
    words = (
        "--model",
        "test_vit",
        "--size",
        "64x96",
        "--query",
        "1,2",
        "--layer",
        "0",
        "--head",
        "1",
    )
    status, text, err = vitfast(
        "attend", picture, *words, "--alpha", "1", "--colormap", "gray", "--out", out
    )
    assert (status, err) == (0, "")
    assert "weights are random" in text and "4 x 6 patches" in text and f"overlay: {out}" in text
    assert sorted(os.listdir(tmp_path)) == ["in.png", "out.png"]
    model = zoo.build("test_vit", (64, 96))
    found = attention_map(model, picture_input(model, picture, (64, 96)), 0, (1, 2), 1)
    values = found.upsampled((60, 90))[0, 0, 0].numpy()
    expected = 255 * (values - values.min()) / (values.max() - values.min())
    assert np.abs(pixels(out) - expected[..., None]).max() < 4


def test_alpha_is_the_share_of_the_map(vitfast, picture, tmp_path):
    made = {}
    for alpha in ("0", "0.5", "1"):
        out = tmp_path / f"{alpha}.png"
        status, _, _ = vitfast(
            "attend", picture, "--model", "test_vit", "--alpha", alpha, "--out", out
        )
        assert status == 0
        made[alpha] = pixels(out)
    assert np.array_equal(made["0"], pixels(picture))
    assert np.abs(made["0.5"] - (made["0"] + made["1"]) / 2).max() <= 1
    assert np.abs(made["1"] - made["0"]).max() > 50


def test_the_native_size_and_rollout(vitfast, picture, tmp_path):
    out = tmp_path / "out.jpg"
    words = ("--model", "test_vit", "--size", "native", "--rollout")
    status, text, err = vitfast("attend", picture, *words, "--out", out)
    assert (status, err) == (0, "")
    assert "test_vit at 64x96, rollout: 4 x 6 patches" in text
    assert Image.open(out).size == (90, 60)


def test_a_checkpoint(vitfast, picture, tmp_path):
    torch.manual_seed(5)
    model = timm.create_model("test_vit", num_classes=7).eval()
    path, out, other = (tmp_path / name for name in ("weights.pth", "out.png", "other.png"))
    torch.save(model.state_dict(), path)
    words = ("attend", picture, "--model", "test_vit", "--colormap", "gray", "--alpha", "1")
    status, text, err = vitfast(*words, "--checkpoint", path, "--size", "64x96", "--out", out)
    assert (status, err) == (0, "") and "random" not in text
    model.set_input_size(img_size=(64, 96))
    found = attention_map(model, picture_input(model, picture, (64, 96)))
    values = found.upsampled((60, 90))[0, 0, 0].numpy()
    expected = 255 * (values - values.min()) / (values.max() - values.min())
    assert np.abs(pixels(out) - expected[..., None]).max() < 4
    assert vitfast(*words, "--size", "64x96", "--out", other)[0] == 0
    assert np.abs(pixels(out) - pixels(other)).max() > 20


def test_a_flat_map_is_no_division_by_zero():
    from matplotlib import colormaps

    flat = AttentionMap(torch.full((1, 1, 1, 2, 2), 0.25), torch.zeros(1, 1, 1, 0), 0)
    image = Image.new("RGB", (4, 4), (10, 20, 30))
    assert overlay(image, flat, colormaps["gray"], 1.0).getpixel((1, 1)) == (0, 0, 0)


@pytest.mark.parametrize(
    "words, message",
    [
        (("none.png",), "none.png: no such file"),
        (("{tmp}",), "is a folder"),
        (("{tmp}/cut.png",), "is broken"),
        (("{tmp}/text.png",), "no image that Pillow knows"),
        (("{in}", "--model", "vit_bse_patch16_224"), "did you mean"),
        (("{in}", "--model", "test_convnext"), "no attention that is known"),
        (("{in}", "--out", "/no/such/folder/out.png"), "there is no folder"),
        (("{in}", "--out", "{tmp}"), "is a directory"),
        (("{in}", "--out", "{tmp}/out.txt"), "expected the name of a picture"),
        (("{in}", "--out", "{tmp}/out"), "expected the name of a picture"),
        (("{in}", "--colormap", "virdis"), "did you mean viridis"),
        (("{in}", "--alpha", "1.5"), "from 0 to 1"),
        (("{in}", "--alpha", "nan"), "from 0 to 1"),
        (("{in}", "--layer", "x"), "--layer x: expected a number"),
        (("{in}", "--layer", "99"), "layer 99: the model has"),
        (("{in}", "--head", "each"), "--head each: expected a number"),
        (("{in}", "--query", "1,2,3"), "--query 1,2,3"),
        (("{in}", "--query", "900"), "query 900"),
        (("{in}", "--query", "dist"), "no distillation token"),
        (("{in}", "--size", "x"), "--size x: expected a size such as 224 or 1088x1920, or native"),
        (("{in}", "--rollout", "--layer", "1"), "no --layer"),
        (("{in}", "--checkpoint", "none.pth"), "no such file"),
        (("{in}", "--checkpoint", "{tmp}/text.png"), "cannot be read"),
        (("{in}", "--checkpoint", "{tmp}/other.pth"), "does not fit the model"),
        ((), "required"),
        (("{in}", "--pretrained", "--checkpoint", "x"), "not allowed with"),
    ],
)
def test_mistakes(vitfast, picture, tmp_path, words, message):
    whole = picture.read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("hello")
    torch.save(timm.create_model("test_vit2").state_dict(), tmp_path / "other.pth")
    before = sorted(os.listdir(tmp_path))
    filled = [
        str(word).replace("{in}", str(picture)).replace("{tmp}", str(tmp_path)) for word in words
    ]
    model = () if "--model" in words else ("--model", "test_vit")
    out = () if "--out" in words else ("--out", tmp_path / "out.png")
    status, _, err = vitfast("attend", *filled, *model, *out)
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert sorted(os.listdir(tmp_path)) == before


def test_a_disk_that_is_full_leaves_nothing(vitfast, picture, tmp_path, monkeypatch):
    out = tmp_path / "out.png"
    out.write_bytes(b"what was there")

    def full(self, path, *args, **kwargs):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    status, _, err = vitfast("attend", picture, "--model", "test_vit", "--out", out)
    assert status == 2 and "cannot be written" in err and "No space left" in err
    assert out.read_bytes() == b"what was there"
    assert sorted(os.listdir(tmp_path)) == ["in.png", "out.png"]
