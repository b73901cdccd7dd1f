"""Near-duplicates of the packaged photographs: distorted copies find their originals."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vitfast.bench import zoo
from vitfast.demo.photo import Photograph
from vitfast.embedding import Embedder
from vitfast.errors import InputValueError

MODEL = "vit_small_patch14_dinov2"
SIZE = (224, 224)
"""Height and width in pixels that the model sees."""


def _cropped(image: Image.Image) -> Image.Image:
    across, down = image.width // 10, image.height // 10
    return image.crop((across, down, image.width - across, image.height - down))


def _recompressed(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=10)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def _brighter(image: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(1.5)


DISTORTIONS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "cropped to 80 % of each side": _cropped,
    "JPEG of quality 10": _recompressed,
    "mirrored": ImageOps.mirror,
    "brighter by 50 %": _brighter,
}
"""In words -> what is done to a photograph."""


class Query(NamedTuple):
    """A distorted copy and what it found.

    Args:
        original, found: numbers of photographs: whose copy it is, and which came first.
        score, runner_up: cosines of the first and of the second.
    """

    original: int
    distortion: str
    image: Image.Image
    found: int
    score: float
    runner_up: float

    @property
    def right(self) -> bool:
        """Whether the original came first."""
        return self.found == self.original


@dataclass
class Duplicates:
    """What all queries found.

    Args:
        seconds: for the vectors of photographs and queries, decoded images to cosines.
    """

    model: str
    size: tuple[int, int]
    photos: list[Photograph]
    queries: list[Query]
    seconds: float
    pretrained: bool

    def sentence(self) -> str:
        """How many found their original."""
        right = sum(query.right for query in self.queries)
        count = len(self.photos) + len(self.queries)
        text = (
            f"{right} of {len(self.queries)} distorted copies found their original first among "
            f"{len(self.photos)} packaged photographs, by vectors of {self.model} at "
            f"{self.size[1]} x {self.size[0]} pixels: {count} images in {self.seconds:.2f} s."
        )
        if not self.pretrained:
            text += (
                " The weights are random, and vectors the mean over patches: what counts as near "
                "is likeness of colours and textures, not of things (--pretrained does better)."
            )
        return text


def run(
    photos: Sequence[Photograph], name: str, size: tuple[int, int], device: str, pretrained: bool
) -> Duplicates:
    """Embed photographs and distorted copies, and search the former for the latter, exactly.

    Args:
        name: of a timm model.
        size: (height, width) that images are brought to.

    Raises:
        InputValueError: fewer than two photographs, or a model that cannot be had or gives no
            vectors.
    """
    if len(photos) < 2:
        raise InputValueError(
            f"{len(photos)} packaged photograph at hand, a search takes two: "
            "pip install scikit-learn or scikit-image"
        )
    model = zoo.build(name, size, device=device, pretrained=pretrained)
    config = {**model.pretrained_cfg, "input_size": (3, *size)}  # type: ignore[dict-item]
    model.pretrained_cfg = config  # type: ignore[assignment]
    # Of random weights the class token says little: no training made it gather what patches hold.
    embedder = Embedder(model, pool=None if pretrained else "avg", dtype="float32")
    copies = [
        (i, distortion, change(photo.image))
        for i, photo in enumerate(photos)
        for distortion, change in DISTORTIONS.items()
    ]
    start = time.perf_counter()
    vectors = embedder.embed([photo.image for photo in photos] + [copy[2] for copy in copies])
    cosines = vectors[len(photos) :] @ vectors[: len(photos)].T
    seconds = time.perf_counter() - start
    queries = []
    for (original, distortion, image), row in zip(copies, cosines, strict=True):
        first, second = (int(i) for i in np.argsort(-row, kind="stable")[:2])
        found = Query(original, distortion, image, first, float(row[first]), float(row[second]))
        queries.append(found)
    return Duplicates(name, size, list(photos), queries, seconds, pretrained)
