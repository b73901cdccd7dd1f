"""Every kind of file a folder may hold becomes pixels, or one reason."""

from __future__ import annotations

import io
import os
import warnings

import numpy as np
import pytest
from PIL import Image

from vitfast.embedding import find_images
from vitfast.errors import InputTypeError, InputValueError, VitfastError
from vitfast.pictures import decode

RAMP = np.linspace(0, 255, 24 * 16).reshape(24, 16).astype(np.uint8)
COLOURS = np.dstack([RAMP, RAMP[::-1], RAMP[:, ::-1]])


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image, channels=3):
    found = decode(image, channels)
    assert found.mode == ("RGB" if channels == 3 else "L")
    return np.asarray(found)


def test_a_path_bytes_a_file_an_image_and_an_array_are_the_same(tmp_path):
    image = Image.fromarray(COLOURS)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(image))
    data = path.read_bytes()
    for given in (path, str(path), data, bytearray(data), io.BytesIO(data), image, COLOURS):
        assert (pixels(given) == COLOURS).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "I"])
def test_every_mode_keeps_its_brightness(mode):
    grey = Image.fromarray(RAMP)
    if mode == "I;16":
        image = Image.fromarray(RAMP.astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(RAMP.astype(np.int32) * 257)
    elif mode == "P":
        image = grey.convert("RGB").quantize(64)
    else:
        image = (grey if mode in ("1", "L", "LA") else grey.convert("RGB")).convert(mode)
    kind = "TIFF" if mode in ("CMYK", "YCbCr", "I") else "PNG"
    found = pixels(encoded(image, kind)).astype(int)
    assert found.shape == (24, 16, 3)
    if mode == "1":
        assert set(found.ravel()) == {0, 255}
    else:
        assert abs(found - RAMP[..., None]).max() <= 3
    assert pixels(encoded(image, kind), channels=1).shape == (24, 16)


def test_a_palette_with_transparency_makes_no_warning():
    image = Image.fromarray(COLOURS).quantize(16)
    data = encoded(image, transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(data).shape == COLOURS.shape


def test_a_photograph_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    data = encoded(Image.fromarray(COLOURS), exif=exif)
    assert (pixels(data) == np.rot90(COLOURS, -1)).all()
    with Image.open(io.BytesIO(data)) as image:
        assert (pixels(image) == np.rot90(COLOURS, -1)).all()


def test_the_first_frame_counts():
    frames = [Image.fromarray(np.full((8, 8), grey, np.uint8)) for grey in (10, 200)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (pixels(data) == 10).all()


@pytest.mark.parametrize(
    "array, expected",
    [
        (np.array([[0, 128, 255]], np.uint8), [0, 128, 255]),
        (np.array([[0, 32896, 65535]], np.uint16), [0, 128, 255]),
        (np.array([[0, 32896, 65535]], ">u2"), [0, 128, 255]),
        (np.array([[False, True, True]]), [0, 255, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float64), [0, 128, 255]),
    ],
)
def test_arrays_of_any_dtype_span_the_same_range(array, expected):
    assert np.asarray(decode(array, 1)).tolist() == [expected]
    assert np.asarray(decode(array[..., None]))[..., 0].tolist() == [expected]


@pytest.mark.parametrize(
    "given, message",
    [
        (b"", "empty file"),
        (b"hello", "no image that Pillow knows"),
        (encoded(Image.fromarray(COLOURS))[:80], "broken"),
        (encoded(Image.fromarray(COLOURS), "JPEG")[:-100], "broken"),
        (encoded(Image.fromarray(COLOURS), "BMP")[:-100], "broken"),
        ("/no/such/file.png", "No such file"),
        ("/", "Is a directory"),
        (np.zeros((4, 4), np.int64), "dtype int64"),
        (np.full((4, 4), 2.0), "between 0 and 1"),
        (np.full((4, 4), np.nan), "between 0 and 1"),
        (np.zeros((3, 8, 8), np.uint8), "channels last"),
        (np.zeros((0, 4), np.uint8), "no pixels"),
        (np.zeros(4, np.uint8), "expected"),
        (None, "NoneType"),
        (3, "int"),
    ],
)
def test_what_is_no_image_is_one_reason(given, message):
    with pytest.raises(VitfastError, match=message) as caught:
        decode(given)
    assert isinstance(caught.value, (InputValueError, InputTypeError))


def test_bombs_are_refused_before_they_are_read(monkeypatch):
    data = encoded(Image.fromarray(COLOURS))
    for limit in (COLOURS.size // 3 - 1, COLOURS.size // 9):  # Pillow warns; Pillow raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(InputValueError, match="too large"):
                decode(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert (pixels(data) == COLOURS).all()


def test_a_folder_has_ids_in_order(tmp_path):
    names = ["b.JPG", "a/z.png", "a/b/c.webp", "notes.txt", ".hidden.png", ".git/x.png", "ü.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_images(tmp_path)
    assert [one for one, _ in found] == ["a/b/c.webp", "a/z.png", "b.JPG", "ü.png"]
    assert all(path == tmp_path / one for one, path in found)
    assert [one for one, _ in find_images(tmp_path, recursive=False)] == ["b.JPG", "ü.png"]


def test_a_name_that_is_no_text_has_an_id(tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"\xff.png")
    open(name, "w").close()
    assert [one for one, _ in find_images(tmp_path)] == ["\\xff.png"]


def test_no_folder(tmp_path):
    with pytest.raises(InputValueError, match="no such folder"):
        find_images(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(InputValueError, match="a file"):
        find_images(tmp_path / "file")
