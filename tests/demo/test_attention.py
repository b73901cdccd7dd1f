"""The demo's attention map: of the photograph that is shown, and honest about its weights."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vitfast.bench.peers import Setting
from vitfast.demo import attention
from vitfast.demo.photo import Photograph
from vitfast.errors import InputValueError, UnsupportedInputError


@pytest.fixture
def photo():
    return Photograph(Image.effect_noise((90, 70), 60).convert("RGB"), "noise; nobody")


def test_a_map_over_its_photograph(photo):
    found = attention.run(photo, "test_vit", (64, 96), Setting(), False)
    assert (found.rows, found.columns) == (4, 6)
    assert found.picture.size == (96, 64)
    assert 1 / 24 <= found.top <= 1  # of the two patches with the most of 24
    assert found.how == "noise; nobody: its middle 90 x 60 pixels, upscaled to 96 x 64 pixels"
    assert "at 96 x 64 pixels: 4 x 6 patches" in found.sentence()
    assert "weights are random" in found.sentence()
    assert "random" not in found._replace(pretrained=True).sentence()
    other = Photograph(photo.image.rotate(180), "x")
    turned = attention.run(other, "test_vit", (64, 96), Setting(), False)
    assert not np.array_equal(np.asarray(found.picture), np.asarray(turned.picture))


def test_models_without_such_a_map_are_refused(photo):
    with pytest.raises((InputValueError, UnsupportedInputError)):
        attention.run(photo, "test_convnext", (64, 64), Setting(), False)
