"""`vitfast embed` and `vitfast search`: from a folder to what is near, and every mistake."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitfast.embedding import Archive

SMALL = ("--model", "test_vit", "--img-size", "32", "--device", "cpu")


@pytest.fixture
def images(tmp_path):
    """Twelve, and one that is broken."""
    root = tmp_path / "images"
    (root / "below").mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(12):
        picture = Image.fromarray(random.integers(0, 256, (32, 40, 3), np.uint8))
        picture.save(root / f"{'below/' * (i > 7)}{i:02d}.png")
    (root / "broken.jpg").write_bytes(b"\xff\xd8")
    return root


def test_a_folder_is_embedded_and_gone_on_with(vitfast, images, tmp_path):
    out = tmp_path / "out"
    status, text, err = vitfast("embed", images, *SMALL, "--out", out, "--shard-rows", 5)
    assert status == 0
    assert "12 embedded, 1 broken, " in text and "images/s" in text
    assert "broken.jpg" in text and "no image that Pillow knows" in text
    assert err.count("\n") == 1 and "random (seed 0)" in err and "--checkpoint" in err
    assert len(list(out.glob("part-*.parquet"))) == 3
    assert Archive(out).ids[-1] == "below/11.png"
    status, text, _ = vitfast("embed", images, *SMALL, "--out", out)
    assert status == 0
    assert "0 embedded, 12 were there, 1 broken" in text


def test_options_reach_the_embedder(vitfast, images, tmp_path):
    words = ("--dtype", "float32", "--no-normalize", "--pool", "avg", "--no-swap", "--no-recursive",
             "--batch-size", "3", "--workers", "1", "--model-kwargs", "depth=2")  # fmt: skip
    assert vitfast("embed", images, *SMALL, "--out", tmp_path / "out", *words)[0] == 0
    archive = Archive(tmp_path / "out")
    facts = archive.metadata
    assert len(archive) == 8
    assert (facts["dtype"], facts["normalized"], facts["pool"]) == ("float32", False, "avg")
    assert facts["model_kwargs"] == {"depth": 2, "img_size": [32, 32]} and not facts["swapped"]
    query = images / "03.png"
    status, text, _ = vitfast("search", tmp_path / "out", query, "--top", 1, "--json")
    assert status == 0
    assert json.loads(text)[0]["hits"][0]["id"] == "03.png"


def test_more_broken_than_are_listed(vitfast, images, tmp_path):
    for i in range(14):
        (images / f"x{i:02d}.gif").touch()
    status, text, _ = vitfast("embed", images, *SMALL, "--out", tmp_path / "out")
    assert status == 0
    assert "Not embedded: 15; the first 10" in text
    assert "x08.gif" in text and "x09.gif" not in text
    assert len((tmp_path / "out" / "errors.jsonl").read_text().splitlines()) == 15


def test_nothing_but_broken_is_status_1(vitfast, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").touch()
    status, text, _ = vitfast("embed", tmp_path / "in", *SMALL, "--out", tmp_path / "out")
    assert status == 1
    assert "0 embedded, 1 broken" in text


def test_a_bomb_is_one_line_of_the_list(vitfast, images, tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(images / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    status, text, err = vitfast("embed", images, *SMALL, "--out", tmp_path / "out")
    assert status == 0 and "too large: 64x64" in text
    assert "Warning" not in err


def test_ranks(vitfast, images, tmp_path, monkeypatch):
    for rank in ("0", "1"):
        for name, value in (("RANK", rank), ("WORLD_SIZE", "2"), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, value)
        status, text, err = vitfast("embed", images, *SMALL, "--out", tmp_path / "out")
        assert status == 0 and f"rank {rank} of 2: 6 embedded" in text
        assert bool(err) == (rank == "0")
    assert len(Archive(tmp_path / "out")) == 12


def test_search_by_id_and_by_file(vitfast, images, tmp_path):
    out = tmp_path / "out"
    vitfast("embed", images, *SMALL, "--out", out)
    status, text, err = vitfast("search", out, "03.png", images / "below" / "09.png", "--top", 2)
    assert (status, err) == (0, "")
    blocks = text.split("Nearest to ")[1:]
    assert len(blocks) == 2
    assert "  03.png" not in blocks[0]  # itself
    assert "1.0000  below/09.png" in blocks[1].splitlines()[2]
    status, text, _ = vitfast("search", out, "03.png", "--top", 4, "--json")
    (answer,) = json.loads(text)
    assert answer["query"] == "03.png" and len(answer["hits"]) == 4
    archive = Archive(out)
    cosines = archive.vectors().astype(np.float32) @ archive.vector("03.png").astype(np.float32)
    expected = [archive.ids[i] for i in np.argsort(-cosines) if archive.ids[i] != "03.png"][:4]
    assert [hit["id"] for hit in answer["hits"]] == expected


def test_a_checkpoint_that_moved(vitfast, digits, tmp_path):
    root = tmp_path / "digits"
    root.mkdir()
    for i, (image, label) in enumerate(zip(digits.images[:80], digits.labels, strict=False)):
        Image.fromarray(image).save(root / f"{label}-{i:02d}.png")
    weights = tmp_path / "weights.pth"
    weights.write_bytes(digits.checkpoint.read_bytes())
    out = tmp_path / "out"
    kwargs = [f"{key}={value}" for key, value in digits.model_kwargs.items()]
    words = ("--model", digits.model, "--checkpoint", weights, "--model-kwargs", *kwargs)
    status, _, err = vitfast("embed", root, *words, "--out", out, "--device", "cpu")
    assert (status, err) == (0, "")
    query = next(root.glob("3-*.png"))
    status, text, _ = vitfast("search", out, query.name, "--top", 3, "--json")
    assert [hit["id"][0] for hit in json.loads(text)[0]["hits"]] == ["3"] * 3
    weights.rename(tmp_path / "moved.pth")
    status, _, err = vitfast("search", out, query)
    assert status == 2 and "weights.pth: no such file" in err
    again = ("search", out, query, "--checkpoint", tmp_path / "moved.pth", "--top", 1, "--json")
    assert json.loads(vitfast(*again)[1])[0]["hits"][0]["id"] == query.name
    # The words that made it, with other weights: neither added to nor searched.
    status, _, err = vitfast("embed", root, *words[:2], *words[4:], "--out", out)
    assert status == 2 and "weights_sha256 is" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "words, message",
    [
        (("/no/such", *SMALL, "--out", "OUT"), "/no/such: no such folder"),
        ((__file__, *SMALL, "--out", "OUT"), "a file, no folder"),
        (("EMPTY", *SMALL, "--out", "OUT"), "no image in it"),
        (("EMPTY", *SMALL, "--out", "OUT", "--no-recursive"), "--recursive looks below"),
        (("IN", "--model", "vit_bse_patch16_224", "--out", "OUT"), "did you mean"),
        (("IN", *SMALL, "--checkpoint", "/no.pth", "--out", "OUT"), "/no.pth: no such file"),
        (("IN", *SMALL, "--checkpoint", __file__, "--out", "OUT"), "cannot be read"),
        (("IN", *SMALL, "--out", __file__), "is a file; name a folder"),
        (("IN", *SMALL, "--out", __file__ + "/x"), "cannot be a folder"),
        (("IN", *SMALL, "--out", "OUT", "--batch-size", "0"), "at least 1"),
        (("IN", *SMALL, "--out", "OUT", "--shard-rows", "0"), "at least one row"),
        (("IN", *SMALL, "--out", "OUT", "--device", "tpu"), "device"),
        (("IN", *SMALL, "--out", "OUT", "--model-kwargs", "3=4"), "expected KEY=VALUE"),
        (("IN", *SMALL, "--out", "OUT", "--img-size", "x"), "expected a size"),
        (("IN", *SMALL, "--out", "OUT", "--img-size", "33"), "divisible"),
    ],
)
def test_mistakes(vitfast, tmp_path, images, words, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    places = {"IN": images, "EMPTY": tmp_path / "empty", "OUT": tmp_path / "out"}
    status, out, err = vitfast("embed", *(places.get(word, word) for word in words))
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_pretrained_without_a_network(vitfast, images, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    words = ("--model", "test_vit", "--device", "cpu", "--pretrained", "--out", tmp_path / "out")
    status, _, err = vitfast("embed", images, *words)
    assert status == 2
    assert "pretrained weights of test_vit cannot be fetched" in err
    assert len(err.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_mistakes_of_search(vitfast, images, tmp_path):
    out = tmp_path / "out"
    vitfast("embed", images, *SMALL, "--out", out)

    def refused(message, *words):
        status, text, err = vitfast("search", *words)
        assert (status, text) == (2, "")
        assert message in err and len(err.splitlines()) == 1

    refused("no such folder", tmp_path / "none", "03.png")
    refused("holds no vectors", images, "03.png")
    refused("no id in", out, "nothing.png")
    refused("a folder", out, images)
    refused("no image that Pillow knows", out, images / "broken.jpg")
    refused("at least 1", out, "03.png", "--top", 0)
    refused("weights_sha256", out, images / "03.png", "--checkpoint", weights_of_another(tmp_path))


def weights_of_another(folder: Path) -> Path:
    import timm
    import torch

    torch.save(timm.create_model("test_vit", img_size=32).state_dict(), folder / "other.pth")
    return folder / "other.pth"


def test_without_pyarrow(vitfast, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for words in (("embed", images, *SMALL, "--out", tmp_path / "out"), ("search", tmp_path, "x")):
        status, out, err = vitfast(*words)
        assert (status, out) == (2, "")
        assert err == 'vitfast: error: Parquet files need pyarrow: pip install "vitfast[embed]"\n'
