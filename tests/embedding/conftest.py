"""A model of milliseconds, and small images of every colour."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitfast.embedding import Embedder


@pytest.fixture(scope="session")
def small() -> Callable[..., Embedder]:
    """Makes an Embedder of timm's test_vit, 32x32, with random weights."""

    def make(**options: object) -> Embedder:
        options = {"model_kwargs": {"img_size": 32}, "device": "cpu", "batch_size": 4, **options}
        return Embedder("test_vit", **options)

    return make


@pytest.fixture(scope="session")
def embedder(small: Callable[..., Embedder]) -> Embedder:
    return small()


@pytest.fixture
def pictures() -> list[np.ndarray]:
    """Ten images, none like another."""
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (40, 32 + i, 3), np.uint8) for i in range(10)]


@pytest.fixture
def folder(tmp_path: Path, pictures: list[np.ndarray]) -> Path:
    """The ten as PNG files 0.png to 4.png and below/5.png to below/9.png, and one that is none."""
    root = tmp_path / "images"
    (root / "below").mkdir(parents=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(root / f"{'below/' * (i > 4)}{i}.png")
    (root / "notes.txt").write_text("no image")
    return root
