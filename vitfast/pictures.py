"""Images as users have them, decoded to 8 bits a channel."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vitfast.errors import InputTypeError, InputValueError


def check_is_file(path: str | os.PathLike[str]) -> Path:
    """The path of a file that is there.

    Raises:
        InputValueError: no such file, or a folder.
    """
    file = Path(path)
    if not file.exists():
        raise InputValueError(f"{file}: no such file")
    if file.is_dir():
        raise InputValueError(f"{file} is a folder; name a file")
    return file


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """The image in a file, as `decode`.

    Raises:
        InputValueError: no such file, a folder, or no image that Pillow can read to its end; the
            message names the file.
    """
    file = check_is_file(path)
    try:
        with warnings.catch_warnings():
            # Of what is refused here anyway. Not in `decode`, which threads call: filters are the
            # process's.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return decode(file)
    except InputValueError as error:
        what = str(error)
        verb = "" if what.startswith("cannot") else "is "
        raise InputValueError(f"{file} {verb}{what}") from error.__cause__


def decode(image: Any, channels: int = 3) -> Image.Image:
    """An upright 8-bit image of the first frame, in mode "RGB" or, for one channel, "L".

    Transparency is dropped, as timm's own readers do; 16 bits are scaled to 8.

    Args:
        image: a path, the bytes of a file, a file open for reading, a PIL image, or an array
            [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of uint8, uint16, bool or of floats from 0
            to 1.
        channels: 3 or 1.

    Raises:
        InputValueError: an empty, broken, unknown or too large file, or an array of other values.
        InputTypeError: nothing of the above, or an array of another shape or dtype.
    """
    if isinstance(image, np.ndarray):
        return _in_mode(Image.fromarray(_bytes_of(image)), channels)
    if isinstance(image, Image.Image):
        return _in_mode(ImageOps.exif_transpose(image), channels)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _read(io.BytesIO(image), channels)
    if isinstance(image, (str, os.PathLike)):
        try:
            with open(image, "rb") as file:
                return _read(file, channels)
        except OSError as error:
            raise InputValueError(f"cannot be read: {error.strerror or error}") from error
    if hasattr(image, "read"):
        return _read(image, channels)
    raise InputTypeError(
        f"expected a path, bytes, a NumPy array or a PIL image, got {type(image).__name__}"
    )


def _read(file: Any, channels: int) -> Image.Image:
    """The image of a file; what a decoder raises, of whatever type, becomes an InputValueError."""
    try:
        with Image.open(file) as image:
            limit = Image.MAX_IMAGE_PIXELS
            # Pillow itself only warns from here up to twice the limit. Only the header is read yet.
            if limit is not None and image.width * image.height > limit:
                raise InputValueError(
                    f"too large: {image.width}x{image.height}, Pillow's limit is {limit} pixels"
                )
            return _in_mode(ImageOps.exif_transpose(image), channels)
    except InputValueError:
        raise
    except UnidentifiedImageError as error:
        file.seek(0)
        what = "no image that Pillow knows" if file.read(1) else "an empty file"
        raise InputValueError(what) from error
    except Image.DecompressionBombError as error:
        raise InputValueError(f"too large: {error}") from error
    except Exception as error:  # plugins raise struct.error, zlib.error, IndexError and others
        raise InputValueError(f"broken: {type(error).__name__}: {error}") from error


def _in_mode(image: Image.Image, channels: int) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # convert() would clip these to 0..255: a 16-bit photograph would come out white.
        values = np.asarray(image)
        if image.mode == "I":  # a PNG of 16 bits in older Pillows
            if values.min() < 0 or values.max() > 65535:
                raise InputValueError("an image of 32-bit integers beyond 16 bits")
            values = values.astype(np.uint16)
        image = Image.fromarray(_bytes_of(values))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns of transparency in bytes
    return image.convert("RGB" if channels == 3 else "L")


def _bytes_of(values: np.ndarray) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3 or 4] out of an array as `decode` takes it."""
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)):
        raise InputTypeError(
            f"an array of shape {list(values.shape)}: expected [H, W], [H, W, 3] or [H, W, 4], "
            "channels last"
        )
    if values.size == 0:
        raise InputValueError(f"an array of shape {list(values.shape)} has no pixels")
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:  # of either byte order
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if values.dtype.kind == "f":
        if not (values.min() >= 0 and values.max() <= 1):  # NaN is neither
            raise InputValueError("floating point pixels have to lie between 0 and 1")
        return np.rint(values.astype(np.float32) * 255).astype(np.uint8)
    raise InputTypeError(f"pixels of dtype {values.dtype}: expected uint8, uint16, bool or floats")
