"""2x2 neighbours of a feature map side by side, then a norm, in plain PyTorch: the definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from vitfast.ops.add_norm.reference import normalise


class Call(NamedTuple):
    """The arguments of `vitfast::patch_merge` before `backend`, in the order of its schema.

    As in `vitfast.ops.patch_merge`; save_stats says whether the statistics that the backward needs,
    [rows, 2] of mean (0 with "rms") and 1 / sqrt(var + eps), are returned beside the result.
    """

    x: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    norm: str | None
    out_dtype: torch.dtype | None
    save_stats: bool


class BackwardCall(NamedTuple):
    """The arguments of `vitfast::patch_merge_backward` before `backend`, in its schema's order.

    grad [B, ceil(H / 2), ceil(W / 2), 4 C] is the gradient of the result, stats what the forward
    saved; shape and dtype are x's, which is not given where norm is None. The others as in
    `vitfast.ops.patch_merge`.
    """

    grad: torch.Tensor
    x: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    stats: torch.Tensor
    norm: str | None
    shape: Sequence[int]
    dtype: torch.dtype

    def forward_call(self) -> Call:
        """The forward's call; an x that was not given is one number, expanded to x's shape."""
        x = self.x
        if x is None:
            x = self.grad.new_empty((), dtype=self.dtype).expand(self.shape)
        return Call(x, self.weight, self.bias, self.eps, self.norm, self.grad.dtype, True)


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
