"""Small models and images for tiled inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import vitfast


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tensors are tiny


@pytest.fixture(scope="session")
def vit() -> Iterator[nn.Module]:
    """A swapped ViT of patches of 16 and inputs of any size."""
    torch.manual_seed(0)
    model = vitfast.create_model("test_vit", dynamic_img_size=True, depth=2, num_classes=7)
    yield model.eval()


class Picked(nn.Module):
    """Every fourth pixel: what tiles agree on to the last bit. It counts and records its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[torch.Tensor] = []
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.batches.append(x)
        return x[..., ::4, ::4]


@pytest.fixture
def picked() -> Picked:
    return Picked()


@pytest.fixture
def failing() -> Callable[..., Any]:
    """failing(where): a model as `picked` that raises for batches whose pixels include one of these
    values."""

    def make(*values: float) -> Picked:
        class Failing(Picked):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                found = super().forward(x)
                if any((x == v).any() for v in values):
                    raise RuntimeError("a bad tile")
                return found

        return Failing()

    return make
