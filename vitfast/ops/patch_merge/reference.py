"""2x2 neighbours of a feature map side by side, then a norm, in plain PyTorch: the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vitfast.ops.add_norm.reference import normalise


def patch_merge(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    norm: str | None = "layer",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """timm `PatchMerging` up to its reduction: odd sizes are padded with zeros, then normalised."""
    b, h, w, c = x.shape
    x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
    x = x.reshape(b, (h + 1) // 2, 2, (w + 1) // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
    if norm is None:
        return x.to(out_dtype or x.dtype)
    return normalise(x, weight, bias, eps, norm, out_dtype)
