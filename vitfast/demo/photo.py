"""The demo's photographs: the user's own, or those that packages at hand come with."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from vitfast.errors import InputValueError
from vitfast.pictures import read_image

BUILT_IN = "grace_hopper.jpg"
"""A name among matplotlib's sample data."""
BUILT_IN_CREDIT = "Rear Admiral Grace Hopper; US Navy, public domain; shipped with matplotlib"

PACKAGED = (
    (
        "sklearn",
        "datasets/images/china.jpg",
        "a temple in China; danielbuechele, CC BY 2.0; scikit-learn",
    ),
    ("sklearn", "datasets/images/flower.jpg", "a flower; vultilion, CC BY 2.0; scikit-learn"),
    ("matplotlib", f"mpl-data/sample_data/{BUILT_IN}", BUILT_IN_CREDIT),
    ("skimage", "data/astronaut.png", "astronaut Eileen Collins; NASA; scikit-image"),
    ("skimage", "data/chelsea.png", "a cat, Chelsea; Stefan van der Walt, CC0; scikit-image"),
    ("skimage", "data/coffee.png", "a cup of coffee; Rachel Michetti, CC0; scikit-image"),
    ("skimage", "data/rocket.jpg", "a rocket's launch; SpaceX, CC0; scikit-image"),
    ("skimage", "data/motorcycle_left.png", "a motorcycle; D. Scharstein, CC0; scikit-image"),
    ("skimage", "data/camera.png", "a photographer; Lav Varshney, CC0; scikit-image"),
    ("skimage", "data/hubble_deep_field.jpg", "Hubble's deep field; NASA; scikit-image"),
    ("skimage", "data/coins.png", "coins of Pompeii; Brooklyn Museum; scikit-image"),
)
"""(package, file in it, what it shows and whose it is), those with the most to see first."""


class Photograph(NamedTuple):
    """An RGB image, upright, and in words what it shows and where it is from."""

    image: Image.Image
    credit: str

    @property
    def name(self) -> str:
        """The first words of the credit."""
        return self.credit.split(";")[0]


def load(path: str | os.PathLike[str] | None = None) -> Photograph:
    """The photograph that models are timed on.

    Args:
        path: the user's file; the built-in photograph by default.

    Raises:
        InputValueError: no such file, a folder, or no image that Pillow can read to its end.
    """
    if path is None:
        from matplotlib import cbook

        found = cbook.get_sample_data(BUILT_IN, asfileobj=False)
        return Photograph(read_image(str(found)), BUILT_IN_CREDIT)
    try:
        return Photograph(read_image(path), Path(path).name)
    except InputValueError as error:
        raise InputValueError(f"--image {error}") from error.__cause__


def packaged() -> list[Photograph]:
    """All of `PACKAGED` whose packages are installed, in that order; nothing is downloaded, and
    the packages themselves are not imported."""
    found = []
    for package, file, credit in PACKAGED:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            path = Path(folder, file)
            if path.is_file():
                found.append(Photograph(read_image(path), credit))
                break
    return found


def enlarged(photo: Photograph, height: int, width: int) -> tuple[Image.Image, str]:
    """(image, how it came to be): a photograph at another size, cropped to its shape first.

    Args:
        height, width: of the result in pixels; it is the middle of the photograph, resampled by a
            cubic filter.
    """
    whole = photo.image
    scale = min(whole.width / width, whole.height / height)
    crop = (max(1, round(width * scale)), max(1, round(height * scale)))
    left, top = (whole.width - crop[0]) // 2, (whole.height - crop[1]) // 2
    box = (left, top, left + crop[0], top + crop[1])
    image = whole.crop(box).resize((width, height), Image.Resampling.BICUBIC)
    middle = "whole" if crop == whole.size else f"middle {crop[0]} x {crop[1]} pixels"
    verb = "upscaled" if scale < 1 else "as it is" if scale == 1 else "scaled down"
    return image, f"{photo.credit}: its {middle}, {verb} to {width} x {height} pixels"
