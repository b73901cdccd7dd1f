"""Attention maps as pictures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from vitfast.highres.attention.attention_maps import AttentionMap


def overlay(
    picture: Image.Image,
    found: AttentionMap,
    colours: Callable[[np.ndarray], np.ndarray],
    alpha: float,
) -> Image.Image:
    """A map in colours over the picture, from its least to its largest value.

    Args:
        picture: an RGB image of any size, to which the map is resampled.
        found: of one image; the mean of its heads and queries is shown where there are several.
        colours: from values between 0 and 1, [H, W], to RGBA between 0 and 1, [H, W, 4], as
            matplotlib's colormaps are.
        alpha: share of the map in the result, 0 to 1.
    """
    mean = AttentionMap(found.patches.mean((1, 2), keepdim=True).float(), found.prefix, found.layer)
    values = mean.upsampled((picture.height, picture.width))[0, 0, 0].cpu().numpy()
    low, high = float(values.min()), float(values.max())
    shares = (values - low) / (high - low) if high > low else np.zeros_like(values)
    coloured = colours(shares)[..., :3] * 255
    blended = (1 - alpha) * np.asarray(picture, dtype=np.float32) + alpha * coloured
    return Image.fromarray(blended.round().astype(np.uint8))
