"""Images of every kind are read by rows, as Pillow would read them; broken ones are named."""

from __future__ import annotations

import importlib.util
import types

import numpy as np
import pytest
import torch
from PIL import Image

from vitfast.errors import InputTypeError, InputValueError
from vitfast.highres import tiled
from vitfast.highres.tiles import readers
from vitfast.highres.tiles.readers import open_source
from vitfast.highres.tiles.tiff import is_cut_off

READERS = ("pyvips", "tifffile", "pillow")
RGB = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
GREY, DEEP = RGB[..., 0], RGB[..., 0].astype(np.uint16) * 257


@pytest.fixture(params=READERS)
def reader(request, monkeypatch) -> str:
    """Only this reader, and Pillow, are installed."""
    if request.param != "pillow" and importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    optional = readers._optional
    monkeypatch.setattr(
        readers, "_optional", lambda name: optional(name) if name == request.param else None
    )
    return request.param


def read(image, channels: int | None = 3, step: int = 33, **options) -> np.ndarray:
    """[H, W, C], read in parts of some rows that overlap by a few."""
    source = open_source(image, **options)
    source.select(channels)
    parts = []
    for top in range(0, source.height, step):
        rows = source.rows(max(top - 5, 0), min(top + step, source.height))
        parts.append(rows[:, min(top, 5) :])
    source.close()
    found = torch.cat(parts, 1)
    assert found.dtype == source.dtype and found.shape[0] == source.channels
    return found.permute(1, 2, 0).numpy()


# Arrays


@pytest.mark.parametrize(
    "image, expected",
    [
        (RGB, RGB),
        (RGB.transpose(2, 0, 1), RGB),
        (torch.from_numpy(RGB).permute(2, 0, 1), RGB),
        (Image.fromarray(RGB), RGB),
        (RGB[::-1, ::-1], RGB[::-1, ::-1]),
        (GREY, np.stack([GREY] * 3, -1)),
        (GREY[..., None], np.stack([GREY] * 3, -1)),
        (torch.from_numpy(GREY), np.stack([GREY] * 3, -1)),
        (torch.from_numpy(DEEP), np.stack([DEEP] * 3, -1)),
        (np.dstack([RGB, GREY]), RGB),
        (np.dstack([GREY, GREY + 1]), np.stack([GREY] * 3, -1)),
        (DEEP.astype(">u2"), np.stack([DEEP] * 3, -1)),
        (RGB.astype(">f4"), RGB.astype(np.float32)),
        (RGB / 3, RGB / 3),
        (GREY > 99, np.stack([(GREY > 99) * np.uint8(255)] * 3, -1)),
    ],
)
def test_arrays_are_read_for_three_channels(image, expected):
    found = read(image)
    assert found.dtype == expected.dtype.newbyteorder("=") and np.array_equal(found, expected)


def test_other_channels_are_kept_for_models_that_take_them():
    many = np.random.default_rng(0).random((20, 30, 12), dtype=np.float32)
    assert np.array_equal(read(many, 12), many)
    assert np.array_equal(read(many, None), many)
    assert np.array_equal(read(many.transpose(2, 0, 1), 12, layout="CHW"), many)
    tensor = torch.from_numpy(many)
    assert np.array_equal(read(tensor, 12, layout="HWC"), many)
    assert np.array_equal(read(GREY, 1)[..., 0], GREY)
    assert np.array_equal(read(np.dstack([RGB, GREY]), 4), np.dstack([RGB, GREY]))


def test_a_memory_map_is_read_and_left_as_it_is(tmp_path):
    np.save(tmp_path / "x.npy", RGB)
    found = read(np.load(tmp_path / "x.npy", mmap_mode="r"))
    assert np.array_equal(found, RGB)


def test_a_zarr_is_read(tmp_path):
    zarr = pytest.importorskip("zarr")
    array = zarr.create_array(str(tmp_path / "x"), shape=RGB.shape, chunks=(16, 16, 3), dtype="u1")
    array[:] = RGB
    assert np.array_equal(read(array), RGB)


@pytest.mark.parametrize(
    "image, error, message",
    [
        (np.zeros((4, 5, 6, 7, 8), np.uint8), InputValueError, "an image has axes"),
        (np.zeros(7, np.uint8), InputValueError, "an image has axes"),
        (torch.zeros(7), InputValueError, "an image has axes"),
        (np.zeros((9, 9, 3), np.int64), InputTypeError, "uint8, uint16 or floating, not int64"),
        (np.zeros((9, 9, 3), complex), InputTypeError, "not complex128"),
        (torch.zeros(3, 9, 9, dtype=torch.int32), InputTypeError, "not torch.int32"),
        (torch.zeros(9, 9, 3), InputValueError, "give layout='HWC'"),
        (np.zeros((9, 9, 7), np.uint8), InputValueError, "has 7 channels .* takes 3"),
        (np.zeros((0, 9, 3), np.uint8), InputValueError, "is empty"),
        (torch.zeros(3, 9, 0), InputValueError, "is empty"),
        (None, InputTypeError, "not NoneType"),
        (Image.fromarray(np.full((4, 4), 70000, np.int32)), InputValueError, "no known white"),
    ],
)
def test_what_is_no_image_is_one_sentence(image, error, message):
    with pytest.raises(error, match=message) as caught:
        read(image)
    assert "\n" not in str(caught.value)


# Files


def rgba() -> Image.Image:
    return Image.fromarray(np.dstack([RGB, GREY]), "RGBA")


FILES = {
    "rgb.png": (lambda: Image.fromarray(RGB), {}),
    "rgba.png": (rgba, {}),
    "grey.png": (lambda: Image.fromarray(GREY), {}),
    "grey-alpha.png": (lambda: rgba().convert("LA"), {}),
    "palette.png": (lambda: Image.fromarray(RGB).quantize(16), {}),
    "bits.png": (lambda: Image.fromarray(GREY > 99), {}),
    "rgb.jpg": (lambda: Image.fromarray(RGB), {}),
    "grey.jpg": (lambda: Image.fromarray(GREY), {}),
    "rgb.webp": (lambda: Image.fromarray(RGB), {"lossless": True}),
    "rgb.tif": (lambda: Image.fromarray(RGB), {}),
    "lzw.tif": (lambda: Image.fromarray(RGB), {"compression": "tiff_lzw"}),
    "grey.tif": (lambda: Image.fromarray(GREY), {}),
    "palette.tif": (lambda: Image.fromarray(RGB).quantize(16), {}),
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_what_pillow_converts_them_to(reader, tmp_path, name):
    make, options = FILES[name]
    make().save(tmp_path / name, **options)
    with Image.open(tmp_path / name) as image:
        expected = np.asarray(image.convert("RGB"))
    found = read(tmp_path / name)
    assert found.dtype == np.uint8
    # Decoders of JPEG differ by rounding.
    assert np.abs(found.astype(int) - expected).max() <= (2 if name.endswith("jpg") else 0)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_sixteen_bits_stay_sixteen(reader, tmp_path, name):
    Image.fromarray(DEEP).save(tmp_path / name)
    found = read(str(tmp_path / name))
    assert found.dtype == np.uint16 and np.array_equal(found, np.stack([DEEP] * 3, -1))


@pytest.mark.parametrize("name", ["turned.jpg", "turned.tif"])
def test_photographs_are_turned_upright(reader, tmp_path, name):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.fromarray(RGB).save(tmp_path / name, exif=exif, quality=95)
    assert read(tmp_path / name).shape == (70, 90, 3)


@pytest.mark.parametrize(
    "options",
    [
        dict(tile=(32, 16)),
        dict(tile=(32, 16), compression="zlib", predictor=True),
        dict(rowsperstrip=7),
        dict(rowsperstrip=7, compression="zlib"),
        dict(rowsperstrip=7, byteorder=">", dtype=np.uint16),
        dict(planarconfig="separate"),
        dict(dtype=np.float32),
    ],
)
def test_tiffs_of_every_layout(reader, tmp_path, options):
    tifffile = pytest.importorskip("tifffile")
    pixels = RGB.astype(options.pop("dtype", np.uint8))
    if reader == "pillow" and pixels.dtype != np.uint8:
        pytest.skip("Pillow knows no such pixels")
    planes = pixels.transpose(2, 0, 1) if "planarconfig" in options else pixels
    tifffile.imwrite(tmp_path / "x.tif", planes, photometric="rgb", **options)
    assert np.array_equal(read(tmp_path / "x.tif"), pixels)


def test_rows_of_a_tiff_are_decoded_as_they_are_asked_for(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    monkeypatch.setattr(readers, "_optional", lambda n: tifffile if n == "tifffile" else None)
    tifffile.imwrite(tmp_path / "x.tif", RGB, photometric="rgb", tile=(16, 16), compression="zlib")
    source = open_source(tmp_path / "x.tif")
    source.select(3)
    asked, read_segments = [], source._file.filehandle.read_segments

    def recorded(offsets, counts, indices, **options):
        asked.extend(indices)
        return read_segments(offsets, counts, indices, **options)

    handle = types.SimpleNamespace(read_segments=recorded)
    monkeypatch.setattr(source, "_file", types.SimpleNamespace(filehandle=handle))
    assert np.array_equal(source.rows(20, 40).permute(1, 2, 0), RGB[20:40])
    assert asked == list(range(5, 15))  # five tiles across, rows 16 to 48


# Broken files


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif", "x.webp"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.6])
def test_a_file_that_is_cut_off_is_refused_and_nothing_written(reader, tmp_path, name, share):
    path = tmp_path / name
    Image.fromarray(RGB).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    out = tmp_path / "out.npy"
    with pytest.raises(InputValueError) as caught:
        tiled(lambda x: x, path, 32, out=out, resume=tmp_path / "state")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("options", [dict(tile=(16, 16)), dict(rowsperstrip=7), {}])
def test_a_cut_off_tiff_is_known_by_its_header(tmp_path, bigtiff, byteorder, options):
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "x.tif"
    options |= dict(bigtiff=bigtiff, byteorder=byteorder, photometric="rgb")
    tifffile.imwrite(path, RGB, **options)
    assert not is_cut_off(path)
    whole = path.read_bytes()
    for kept in (len(whole) - 1, len(whole) // 2, 100, 20, 6):
        path.write_bytes(whole[:kept])
        assert is_cut_off(path)
    path.write_bytes(RGB.tobytes())
    assert not is_cut_off(path)  # no TIFF


def test_what_is_no_image_file(reader, tmp_path):
    (tmp_path / "x.png").write_text("not an image")
    for path, message in [
        (tmp_path / "none.png", "no such file"),
        (tmp_path, "is a folder"),
        (tmp_path / "x.png", "no image|broken"),
    ]:
        with pytest.raises(InputValueError, match=message) as caught:
            tiled(lambda x: x, path, 32)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_more_pixels_than_pillow_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_optional", lambda name: None)
    Image.fromarray(RGB).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputValueError, match=r"install vitfast\[highres\], or raise PIL"):
        tiled(lambda x: x, tmp_path / "x.png", 32)


def test_a_changed_file_is_another_run(reader, tmp_path):
    out = np.empty((3, 90, 70), np.float32)
    Image.fromarray(RGB).save(tmp_path / "x.png")
    options = dict(tile=32, out=out, resume=tmp_path / "state")
    tiled(lambda x: x, tmp_path / "x.png", **options)
    assert np.array_equal(out.transpose(1, 2, 0), RGB.astype(np.float32) / 255)
    Image.fromarray(RGB[::-1] // 2).save(tmp_path / "x.png")
    with pytest.raises(InputValueError, match="of another run: file differ"):
        tiled(lambda x: x, tmp_path / "x.png", **options)


def test_a_list_of_paths_is_a_video(reader, tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        Image.fromarray(RGB + np.uint8(i)).save(path)
    found = list(tiled(lambda x: x, paths, 64, mean=0, std=1 / 255))
    for i, values in enumerate(found):
        expected = torch.from_numpy(RGB + np.uint8(i)).permute(2, 0, 1).float()
        torch.testing.assert_close(values, expected)
