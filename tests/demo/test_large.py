"""A large photograph: three ways, each in a process, and how far apart they are."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from vitfast.bench import child
from vitfast.bench.peers import Setting
from vitfast.demo import large, large_child
from vitfast.demo.large import Scale, Way
from vitfast.demo.photo import Photograph
from vitfast.errors import InputValueError

SMALL = Scale("test_convnext", (96, 160), 64, 0.01)


@pytest.fixture
def photo():
    return Photograph(Image.effect_noise((90, 70), 60).convert("RGB"), "noise; nobody")


def in_this_process(module, arguments, timeout):
    """What a child would say."""
    assert module == "vitfast.demo.large_child"
    return json.loads(json.dumps(large_child.measure(arguments)))


def test_three_ways(photo, monkeypatch):
    monkeypatch.setattr(child, "answer", in_this_process)
    found = large.run(photo, SMALL, Setting(), False, lambda text, share: None)
    timm, shot, tiles = found.ways
    assert all(len(way.seconds) == 1 for way in found.ways)
    assert timm.apart < 1e-5  # the same arithmetic
    assert 1e-3 < tiles.apart < 1  # a tile sees less
    assert shot.apart is None and shot.apart_reason
    assert found.photo.size == (160, 96)
    assert set(found.pictures) == {"vitfast", "tiles"}
    assert found.pictures["vitfast"].size == (5, 3)
    assert "test_convnext at 160 x 96 pixels: one shot in " in found.sentence()
    assert "upscaled to 160 x 96 pixels" in found.how


def test_one_way_that_fails_leaves_the_others_alone(photo, monkeypatch):
    def answer(module, arguments, timeout):
        if arguments["way"] == "timm":
            raise child.ChildError("killed")
        return in_this_process(module, arguments, timeout)

    monkeypatch.setattr(child, "answer", answer)
    found = large.run(photo, SMALL, Setting(), False, lambda text, share: None)
    assert found.way("timm").reason == "failed: killed"
    assert found.way("tiles").apart > 0
    assert "timm's one shot" not in found.sentence()


def test_calls_are_repeated_while_there_is_time(tmp_path):
    np.save(tmp_path / "in.npy", np.zeros((64, 64, 3), np.uint8))
    arguments = {
        "way": "vitfast", "model": "test_convnext", "pixels": str(tmp_path / "in.npy"), "tile": 64,
        "overlap": 0.1, "dtype": "float32", "device": "cpu", "threads": 1, "pretrained": False,
        "budget": 1000.0, "out": str(tmp_path / "out.npy"),
    }  # fmt: skip
    assert len(large_child.measure(arguments)["seconds"]) == large_child.MOST_CALLS
    assert np.load(tmp_path / "out.npy").shape[1:] == (2, 2)


def test_features_are_compared_on_the_cells_that_both_have():
    shot = np.ones((2, 3, 4), np.float32)
    more = np.pad(shot, ((0, 0), (0, 1), (0, 0)), constant_values=9.0)
    more[0, 0, 0] = 2.0
    ways = [Way("vitfast"), Way("tiles"), Way("timm")]
    large._compare(
        ways, {"vitfast": shot, "tiles": more, "timm": shot},
        {"vitfast": "a", "tiles": "a", "timm": "b"},
    )  # fmt: skip
    assert ways[1].apart == pytest.approx(1 / np.sqrt(24))
    assert ways[0].apart is None and ways[2].apart is None
    assert "depend on the size" in ways[2].apart_reason


def test_an_unknown_model_is_refused_at_once(photo):
    with pytest.raises(InputValueError, match="did you mean"):
        large.run(photo, Scale("convnxt_tiny"), Setting(), False, lambda text, share: None)
