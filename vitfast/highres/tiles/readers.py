"""What an image is read with: files by pyvips or, for TIFF, tifffile where installed, else Pillow.

pyvips reads any format by rows: what its library cannot read in any order (JPEG, PNG) it decodes
once, into memory below about 100 MB, else into a temporary file. tifffile decodes the strips or
tiles of a TIFF that the rows lie in. Pillow reads the whole image (1 byte per pixel and channel).

A file that is cut off is reported before the first row is given.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from vitfast.errors import InputTypeError, InputValueError, first_line
from vitfast.highres.tiles import tiff
from vitfast.highres.tiles.sources import (
    LAYOUTS,
    ArraySource,
    Source,
    TensorSource,
    pillow_pixels,
    to_planes,
)
from vitfast.pictures import check_is_file

_OTHER_COLOURS = ("cmyk", "hsv", "lab", "labq", "labs", "lch", "xyz", "yxy")
"""libvips' names of colours that are no RGB."""
_TIFF = (".tif", ".tiff", ".btf")


def open_source(image: Any, layout: str = "auto") -> Source:
    """The source of one image: a path, Pillow's image, a tensor or anything like an array.

    Raises:
        InputTypeError, InputValueError: no image; a file that is missing, broken or cut off.
    """
    if layout not in LAYOUTS:
        raise InputValueError(f"layout={layout!r} is none of {', '.join(LAYOUTS)}")
    if isinstance(image, (str, os.PathLike)):
        return open_path(os.fspath(image))
    if isinstance(image, Image.Image):
        return ArraySource(pillow_pixels(image), "HWC")
    if isinstance(image, torch.Tensor):
        return TensorSource(image, layout)
    if all(hasattr(image, name) for name in ("shape", "dtype", "__getitem__")):
        return ArraySource(image, layout)
    raise InputTypeError(
        f"an image is a path, an array, a tensor or Pillow's image, not {type(image).__name__}"
    )


def open_path(path: str) -> Source:
    """The source of a file; its `identity` is the file's path, size and time of change.

    Raises:
        InputValueError: no such file, a folder, no image, or one that is broken or cut off.
    """
    status = check_is_file(path).stat()
    if tiff.is_cut_off(path):
        raise InputValueError(f"{path} is cut off: pixels lie behind the end of the file")
    source = _open(path)
    source.identity = f"{os.path.abspath(path)}:{status.st_size}:{status.st_mtime_ns}"
    return source


def _open(path: str) -> Source:
    if (pyvips := _optional("pyvips")) is not None:
        return VipsSource(pyvips, path)
    if path.lower().endswith(_TIFF) and (tifffile := _optional("tifffile")) is not None:
        return TiffSource(tifffile, path)
    return _by_pillow(path)


def _optional(name: str) -> Any:
    """A module, or None where it or a library that it needs is missing."""
    try:
        return __import__(name)
    except (ImportError, OSError):
        return None


def _broken(path: str, error: BaseException) -> InputValueError:
    return InputValueError(f"{path} is broken, or cut off: {first_line(error)}")


def _by_pillow(path: str) -> Source:
    try:
        with Image.open(path) as image:
            return ArraySource(pillow_pixels(image), "HWC")
    except UnidentifiedImageError as error:
        raise InputValueError(f"{path} is no image that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise InputValueError(
            f"{path} has more pixels than Pillow allows: install vitfast[highres], or raise "
            "PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except InputValueError as error:
        raise InputValueError(f"{path}: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise _broken(path, error) from error


class VipsSource(Source):
    """A file of any format that libvips knows, turned upright."""

    def __init__(self, pyvips: Any, path: str) -> None:
        self._error, self._path = pyvips.Error, path
        try:
            image = pyvips.Image.new_from_file(path, fail_on="truncated").autorot()
            if image.interpretation in _OTHER_COLOURS:
                image = image.colourspace("srgb")
            if image.format not in ("uchar", "ushort", "float", "double"):
                raise InputValueError(f"{path}: pixels of the format {image.format} are not read")
            self._image = image
            self.height, self.width, self.channels = image.height, image.width, image.bands
            self.dtype = {
                "uchar": torch.uint8,
                "ushort": torch.uint16,
                "float": torch.float32,
                "double": torch.float64,
            }[image.format]
            # One row makes libvips decode the formats that it reads as a whole, and complain.
            self._read(0, 1)
        except pyvips.Error as error:
            raise _broken(path, error) from error

    def _read(self, top: int, bottom: int) -> torch.Tensor:
        try:
            pixels = self._image.crop(0, top, self.width, bottom - top).numpy()
        except self._error as error:
            raise _broken(f"{self._path}, rows {top} to {bottom},", error) from error
        return to_planes(pixels)


class TiffSource(Source):
    """The first page of a TIFF, by tifffile; decodes the strips or tiles that rows lie in."""

    def __init__(self, tifffile: Any, path: str) -> None:
        self._path = path
        try:
            self._file = tifffile.TiffFile(path)
            self._page = page = self._file.pages[0]
            planar = int(page.planarconfig or 1) == 2 and page.samplesperpixel > 1
            self._is_lazy = not planar and page.imagedepth == 1
            self.height, self.width = page.imagelength, page.imagewidth
            self.channels = page.samplesperpixel
            whites = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
            known = {tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB}
            known |= {tifffile.PHOTOMETRIC.YCBCR}
            self._whole: Source | None = None
            turned = "Orientation" in page.tags and page.tags["Orientation"].value != 1
            packed = page.compression not in tifffile.TIFF.DECOMPRESSORS  # lacks imagecodecs
            if packed or whites or turned or page.photometric not in known or not self._is_lazy:
                # Such codecs, palettes, CMYK, planes apart, pages on their side: for Pillow.
                self._whole = _by_pillow(path)
                self._whole.select(None)
                self.height, self.width = self._whole.height, self._whole.width
                self.channels, self.dtype = self._whole.channels, self._whole.dtype
                return
            self.dtype = ArraySource(np.empty((1, 1, 3), page.dtype)).dtype
            self._read(0, 1)
        except (tifffile.TiffFileError, ValueError, OSError, KeyError, IndexError) as error:
            self.close()
            raise error if isinstance(error, InputValueError) else _broken(path, error) from error

    def _read(self, top: int, bottom: int) -> torch.Tensor:
        if self._whole is not None:
            return self._whole.rows(top, bottom)
        page = self._page
        high = page.tilelength if page.is_tiled else page.rowsperstrip
        across = -(-self.width // page.tilewidth) if page.is_tiled else 1
        first, last = top // high * across, -(-bottom // high) * across
        indices = range(first, min(last, len(page.dataoffsets)))
        result = np.zeros((bottom - top, self.width, self.channels), page.dtype.newbyteorder("="))
        offsets = [page.dataoffsets[i] for i in indices]
        counts = [page.databytecounts[i] for i in indices]
        try:
            segments = self._file.filehandle.read_segments(offsets, counts, indices)
            for data, index in segments:
                options = {"jpegtables": page.jpegtables} if page.jpegtables else {}
                values, (*_, y, x, _), (_, rows, columns, _) = page.decode(data, index, **options)
                if values is None:  # a sparse file
                    continue
                a, b = max(y, top), min(y + rows, bottom)
                part = values[0, a - y : b - y, :columns]
                result[a - top : b - top, x : x + columns] = part[:, : self.width - x]
        except (ValueError, OSError, RuntimeError) as error:
            raise _broken(f"{self._path}, rows {top} to {bottom},", error) from error
        return to_planes(result)

    def close(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
