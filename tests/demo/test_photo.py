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
