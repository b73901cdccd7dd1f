"""The demo's photograph: the user's own, or the one that matplotlib ships."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from vitfast.errors import InputValueError
from vitfast.pictures import read_image

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

        found = cbook.get_sample_data(BUILT_IN, asfileobj=False)
        return read_image(str(found)), BUILT_IN_CREDIT
    try:
        return read_image(path), Path(path).name
    except InputValueError as error:
        raise InputValueError(f"--image {error}") from error.__cause__
