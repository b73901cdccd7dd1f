"""Maps of trained models lie on the digit: where the ink is, and on that image's ink alone."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

import vitfast
from vitfast.highres import attention_map

WRONG = {
    "transposed": lambda maps: maps.mT,
    "upside down": lambda maps: maps.flip(1),
    "mirrored": lambda maps: maps.flip(2),
    "a row down": lambda maps: maps.roll(1, 1),
    "a row up": lambda maps: maps.roll(-1, 1),
    "a column to the right": lambda maps: maps.roll(1, 2),
    "a column to the left": lambda maps: maps.roll(-1, 2),
    "of another image": lambda maps: maps.roll(1, 0),
}
"""What mistakes would make of maps [B, rows, columns]."""


def looks(model, images: torch.Tensor, layer: int, windowed: bool) -> torch.Tensor:
    """[B, rows, columns]: the class token's map; of windows the mean of all patches' maps."""
    if not windowed:
        return attention_map(model, images, layer, "cls").patches[:, 0, 0]
    rows, columns = attention_map(model, images[:1], layer, (0, 0)).patches.shape[-2:]
    every = [(row, column) for row in range(rows) for column in range(columns)]
    return attention_map(model, images, layer, every).patches[:, 0].mean(1)


def correlation(maps: torch.Tensor, ink: torch.Tensor) -> float:
    """Pearson's, over the patches of an image; the mean over images."""
    a, b = (t.flatten(1) - t.flatten(1).mean(1, keepdim=True) for t in (maps, ink))
    return F.cosine_similarity(a, b).mean().item()


@pytest.mark.parametrize("kind, layer", [("vit", 0), ("swin", 0), ("swin", 2)])
def test_attention_lies_on_the_ink(kind, layer, trained_on_digits):
    digits = trained_on_digits(kind)
    model = timm.create_model(digits.model, num_classes=10, **digits.model_kwargs).eval()
    model.load_state_dict(torch.load(digits.checkpoint, weights_only=True))
    assert vitfast.swap(model).counts["blocks_swapped"] == 4
    pixels = torch.from_numpy(digits.images).float()[:, None] / 255
    maps = looks(model, (pixels.expand(-1, 3, -1, -1) - 0.5) / 0.5, layer, kind == "swin")
    ink = F.adaptive_avg_pool2d(pixels, maps.shape[-2:])[:, 0]
    right = correlation(maps, ink)
    wrong = {name: correlation(make(maps), ink) for name, make in WRONG.items()}
    assert right > 0.5
    assert right > max(wrong.values()) + 0.03, wrong
    # A uniform map puts as much on the ink as there is ink.
    shares = maps / maps.sum((1, 2), keepdim=True)
    on_ink = (shares * ink).sum((1, 2)) / ink.mean((1, 2))
    assert on_ink.mean() > 1.2
