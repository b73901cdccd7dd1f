"""Near-duplicates: distortions, what is found, and what is said of it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vitfast.demo import duplicates
from vitfast.demo.photo import Photograph, packaged
from vitfast.errors import InputValueError


@pytest.fixture(scope="module")
def found():
    """Of three pictures of one colour each with a cross of noise: likeness is easy to see."""
    random = np.random.default_rng(0)
    photos = []
    for i, colour in enumerate(((90, 20, 20), (20, 90, 20), (20, 20, 90))):
        pixels = np.full((60, 80, 3), colour, np.uint8)
        pixels[20 + i : 30] = pixels[:, 30 : 40 + i] = random.integers(0, 100, 3)
        photos.append(Photograph(Image.fromarray(pixels), f"picture {i}; noise"))
    return duplicates.run(photos, "test_vit", (64, 64), "cpu", False)


def test_copies_find_their_originals(found):
    assert [(q.original, q.distortion) for q in found.queries] == [
        (i, name) for i in range(3) for name in duplicates.DISTORTIONS
    ]
    assert all(q.right for q in found.queries)
    assert all(0.5 < q.score <= 1.0001 and q.runner_up < q.score for q in found.queries)
    assert found.sentence().startswith(
        "12 of 12 distorted copies found their original first among 3"
    )
    assert "weights are random" in found.sentence()


def test_a_miss_is_counted(found):
    missed = found.queries[0]._replace(found=2)
    wrong = duplicates.Duplicates(
        found.model, found.size, found.photos, [missed, *found.queries[1:]], 1.0, True
    )
    assert not missed.right
    assert wrong.sentence().startswith("11 of 12 ") and "random" not in wrong.sentence()


def test_distortions_change_a_photograph_as_they_say():
    image = packaged()[0].image
    made = {name: change(image) for name, change in duplicates.DISTORTIONS.items()}
    cropped, recompressed, mirrored, brighter = made.values()
    assert cropped.width == image.width - 2 * (image.width // 10)
    assert np.array_equal(np.asarray(mirrored), np.asarray(image)[:, ::-1])
    assert np.asarray(brighter, float).mean() > 1.2 * np.asarray(image, float).mean()
    assert 1 < np.abs(np.asarray(recompressed, float) - np.asarray(image, float)).mean() < 30
    assert all(copy.mode == "RGB" for copy in made.values())


def test_one_photograph_is_nothing_to_search():
    with pytest.raises(InputValueError, match="1 packaged photograph at hand, a search takes two"):
        duplicates.run(packaged()[:1], "test_vit", (64, 64), "cpu", False)
