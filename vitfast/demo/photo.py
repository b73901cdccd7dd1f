"""The demo's photograph: the user's own, or the one that matplotlib ships."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from vitfast.errors import InputValueError

BUILT_IN = "grace_hopper.jpg"
"""A name among matplotlib's sample data."""
BUILT_IN_CREDIT = "Rear Admiral Grace Hopper; US Navy, public domain; shipped with matplotlib"


def load(path: str | os.PathLike[str] | None = None) -> tuple[Image.Image, str]:
    """(photograph, credit): an RGB image, turned upright, and where it is from.

    Args:
        path: the user's file; the built-in photograph by default.

    Raises:
        InputValueError: no such file, a folder, or no image that Pillow can read to its end.
    """
    if path is None:
        from matplotlib import cbook

        found = Path(str(cbook.get_sample_data(BUILT_IN, asfileobj=False)))
        return _read(found), BUILT_IN_CREDIT
    return _read(Path(path)), Path(path).name


def _read(path: Path) -> Image.Image:
    """As `load`, of a file."""
    if not path.exists():
        raise InputValueError(f"--image {path}: no such file")
    if path.is_dir():
        raise InputValueError(f"--image {path} is a folder; name a file")
    try:
        with warnings.catch_warnings():
            # Pillow only warns of an image of more than 89 million pixels up to twice that.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise InputValueError(f"--image {path} is no image that Pillow knows") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputValueError(f"--image {path} is too large: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InputValueError(f"--image {path} is broken: {error}") from error
