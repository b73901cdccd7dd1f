"""Image to tokens in plain PyTorch: the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def patch_embed(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
    pos_embed: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A convolution whose stride is its kernel, as tokens, with embeddings and prefix tokens.

    The image is scaled in float32 (at least), then rounded to the weight's dtype.
    """
    image = normalise(image, mean, std, weight.dtype)
    tokens = F.conv2d(image, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    if prefix is not None:
        prefix = prefix.expand(tokens.shape[0], -1, -1)
        # A position embedding as long as all tokens covers the prefix; a shorter one does not.
        if pos_embed is not None and pos_embed.shape[1] == tokens.shape[1]:
            tokens, pos_embed = tokens + pos_embed, None
        tokens = torch.cat((prefix, tokens), dim=1)
    if pos_embed is not None:
        tokens = tokens + pos_embed
    return tokens.to(out_dtype or tokens.dtype).contiguous()


def normalise(
    image: torch.Tensor,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(image - mean) / std per channel, of uint8 images divided by 255, rounded to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    if image.dtype == torch.uint8:
        image = image.to(wide) / 255
    if mean is not None:
        image = image.to(wide) - mean.to(wide).view(1, -1, 1, 1)
    if std is not None:
        image = image.to(wide) / std.to(wide).view(1, -1, 1, 1)
    return image.to(dtype)
