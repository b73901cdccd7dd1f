"""A small model, its images, and how tests of graphs call them."""

from __future__ import annotations

import timm
import torch
from torch import nn

from vitfast.graphs import beneath


def images(batch: int = 2, seed: int = 0, size: int = 32, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=generator).to(**options)


def vit(**options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=2, num_classes=10,
        **options,
    ).eval()  # fmt: skip


def plain(model: nn.Module, *args, method: str = "forward", **kwargs):
    """What the model's own method gives."""
    return getattr(beneath(type(model)), method)(model, *args, **kwargs)


def same(got: object, want: object) -> bool:
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    return True


def capture(model: nn.Module, *args, **kwargs) -> None:
    """The calls after which there is a graph."""
    model(*args, **kwargs)
    model(*args, **kwargs)
