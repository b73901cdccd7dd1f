"""Samples and cost of `patch_embed`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vitfast.ops.patch_embed.api import DISPATCHER, patch_embed
from vitfast.ops.patch_embed.reference import patch_embed as reference
from vitfast.ops.spec import Cost, OpSpec, Sample, randn, tensor_bytes

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _sample(
    name: str,
    image: tuple[int, int, int, int],
    c: int,
    patch: int | tuple[int, int],
    *,
    uint8: bool = False,
    normalise: bool = False,
    pos: str | None = None,
    prefix: int = 0,
    bias: bool = True,
    view: Callable[[torch.Tensor], torch.Tensor] | None = None,
    tags: tuple[str, ...] = ("odd",),
) -> Sample:
    """pos: None, "patches" or "all", with batch 1; "each" is "all" with the image's batch."""
    b, cin, height, width = image
    p, q = patch if isinstance(patch, tuple) else (patch, patch)

    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if uint8:
            x = torch.randint(0, 256, image, generator=g, dtype=torch.uint8, device="cpu")
        else:
            x = randn(g, *image, dtype=dtype)
        n = (height // p) * (width // q)
        kwargs: dict[str, Any] = {}
        if normalise:
            kwargs |= {
                "mean": torch.tensor(MEAN, device="cpu"),
                "std": torch.tensor(STD, device="cpu"),
            }
        if pos is not None:
            shape = (b if pos == "each" else 1, n if pos == "patches" else prefix + n, c)
            kwargs["pos_embed"] = randn(g, *shape, dtype=dtype, scale=0.5)
        if prefix:
            kwargs["prefix"] = randn(g, 1, prefix, c, dtype=dtype, scale=0.5)
        weight = randn(g, c, cin, p, q, dtype=dtype, scale=(cin * p * q) ** -0.5)
        vector = randn(g, c, dtype=dtype, scale=0.1) if bias else None
        return (x if view is None else view(x), weight, vector), kwargs

    return Sample(name, make, frozenset(tags))


def _cost(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cost:
    image, weight, *bias = args
    pos_embed, prefix = kwargs.get("pos_embed"), kwargs.get("prefix")
    b, _, height, width = image.shape
    c, _, p, q = weight.shape
    n = (height // p) * (width // q)
    tokens = n + (0 if prefix is None else prefix.shape[1])
    read = tensor_bytes(image, weight, *bias, pos_embed, prefix)
    return Cost(
        flops=2.0 * b * n * weight.numel(), bytes=read + b * tokens * c * weight.element_size()
    )


_SMALL = ("odd", "small")

SPEC = OpSpec(
    name="patch_embed",
    public=patch_embed,
    reference=reference,
    dispatcher=DISPATCHER,
    cost=_cost,
    samples=(
        _sample(
            "vit_base_224", (1, 3, 224, 224), 768, 16, pos="all", prefix=1, tags=("real", "check")
        ),
        _sample(
            "vit_base_224_from_bytes",
            (1, 3, 224, 224),
            768,
            16,
            uint8=True,
            normalise=True,
            pos="all",
            prefix=1,
            tags=("real",),
        ),
        _sample(
            "vit_base_1024",
            (1, 3, 1024, 1024),
            768,
            16,
            pos="all",
            prefix=1,
            tags=("real", "large"),
        ),
        _sample(
            "dinov2_small_518", (1, 3, 518, 518), 384, 14, pos="all", prefix=1, tags=("real",)
        ),
        _sample("dinov3_small_256", (2, 3, 256, 256), 384, 16, prefix=5, tags=("real",)),
        _sample(
            "clip_base_32", (2, 3, 224, 224), 768, 32, bias=False, pos="all", prefix=1,
            tags=("real",),
        ),
        _sample("swin_tiny_4", (1, 3, 224, 224), 96, 4, tags=("real",)),
        _sample("patch_8", (1, 3, 48, 64), 24, 8, pos="patches", prefix=2, tags=("odd", "check")),
        _sample("one_channel", (3, 1, 8, 12), 7, 4, pos="all", prefix=1, tags=(*_SMALL, "check")),
        _sample("rectangular", (2, 2, 9, 10), 5, (3, 5), pos="patches", prefix=1, tags=_SMALL),
        _sample("pos_of_each_image", (2, 5, 4, 6), 6, 2, pos="each", tags=_SMALL),
        _sample("bare", (2, 3, 6, 6), 8, 3, bias=False, tags=_SMALL),
        _sample("normalised", (2, 3, 28, 14), 10, 14, normalise=True, pos="patches", tags=_SMALL),
        _sample(
            "bytes", (2, 3, 16, 8), 9, 4, uint8=True, normalise=True, prefix=1,
            tags=("odd", "small", "check"),
        ),
        _sample("bytes_unscaled", (1, 4, 8, 8), 6, 4, uint8=True, tags=("odd",)),
        _sample(
            "channels_last",
            (2, 3, 32, 32),
            17,
            16,
            view=lambda x: x.contiguous(memory_format=torch.channels_last),
        ),
        _sample("cropped", (2, 3, 20, 24), 12, 4, view=lambda x: x[:, :, 2:18, 4:20]),
        _sample("seven_channels", (1, 7, 28, 28), 13, 14, pos="patches"),
        _sample("many_images", (37, 3, 16, 16), 20, 8, pos="all", prefix=1),
        _sample("empty", (0, 3, 16, 16), 8, 8, pos="all", prefix=1, tags=("odd", "empty")),
    ),
)  # fmt: skip
