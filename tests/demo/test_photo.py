"""Photographs: the built-in one, users' own, and what is none."""

from __future__ import annotations

import pytest
from PIL import Image

from vitfast.demo import photo
from vitfast.errors import InputValueError


def test_the_built_in_photograph_is_one():
    image, credit = photo.load()
    assert image.mode == "RGB"
    assert min(image.size) > 400
    assert image.getcolors(maxcolors=10_000) is None  # more than that: not a drawing
    assert "public domain" in credit


def test_a_photograph_is_turned_upright_and_made_rgb(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # as a phone held upright writes it: rotate by 270 degrees to view
    Image.new("L", (40, 20), 128).save(path, exif=exif)
    image, credit = photo.load(path)
    assert (image.size, image.mode, credit) == ((20, 40), "RGB", "turned.jpg")


def test_a_missing_file_a_folder_and_a_text_are_refused(tmp_path):
    with pytest.raises(InputValueError, match="no such file"):
        photo.load(tmp_path / "none.jpg")
    with pytest.raises(InputValueError, match="is a folder"):
        photo.load(tmp_path)
    text = tmp_path / "text.jpg"
    text.write_text("hello")
    with pytest.raises(InputValueError, match="no image that Pillow knows"):
        photo.load(text)


def test_a_file_that_ends_early_is_broken(tmp_path):
    path = tmp_path / "cut.png"
    Image.effect_noise((200, 200), 50).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputValueError, match="is broken"):
        photo.load(path)


def test_an_image_that_unpacks_to_gigabytes_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("1", (300, 300)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80_000)  # 1.1 times as many: only a warning
    with pytest.raises(InputValueError, match="is too large"):
        photo.load(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(InputValueError, match="is too large"):
        photo.load(path)


def test_packaged_photographs_are_those_that_are_installed(monkeypatch, tmp_path):
    every = photo.packaged()
    assert photo.BUILT_IN_CREDIT in [found.credit for found in every]  # matplotlib is always there
    assert all(found.image.mode == "RGB" and min(found.image.size) >= 200 for found in every)
    assert len({found.credit for found in every}) == len(every)
    package = tmp_path / "skimage" / "data"
    package.mkdir(parents=True)
    Image.new("L", (30, 20), 7).save(package / "camera.png")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(photo, "PACKAGED", (
        ("skimage", "data/camera.png", "a photographer; someone"),
        ("skimage", "data/coffee.png", "missing"),
        ("no_such_package", "a.png", "missing"),
    ))  # fmt: skip
    if not any("scikit-image" in found.credit for found in every):
        (found,) = photo.packaged()
        assert (found.name, found.image.mode, found.image.size) == (
            "a photographer", "RGB", (30, 20),
        )  # fmt: skip


@pytest.mark.parametrize(
    "size, middle, verb",
    [
        ((640, 427), "middle 640 x 360 pixels", "upscaled"),
        ((320, 640), "middle 320 x 180 pixels", "upscaled"),
        ((3840, 2160), "whole", "scaled down"),
        ((1280, 720), "whole", "as it is"),
    ],
)
def test_a_photograph_at_another_size_is_cropped_to_its_shape(size, middle, verb):
    given = photo.Photograph(Image.new("RGB", size, "red"), "x; y")
    image, how = photo.enlarged(given, 720, 1280)
    assert image.size == (1280, 720)
    assert how == f"x; y: its {middle}, {verb} to 1280 x 720 pixels"


def test_what_is_cropped_is_the_middle_and_nothing_is_stretched():
    # A red square in the middle of green above blue: 160 pixels above and below fall away.
    image = Image.new("RGB", (320, 500), "blue")
    image.paste("green", (0, 0, 320, 160))
    image.paste("red", (0, 160, 320, 340))
    found, _ = photo.enlarged(photo.Photograph(image, "x"), 360, 640)
    assert found.getextrema() == ((255, 255), (0, 0), (0, 0))
