"""Valid tokens of a padded batch, packed without the padding, and back.

Between two layers that know where an image ends everything is a row of channels: norms, linear
layers and MLPs compute what packed rows hold, and nothing of the padding; attention takes the
sequences one by one (Krell et al. 2021; NaViT, Dehghani et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from vitfast.plans import Sequences


class Packing:
    """Where the valid tokens of one batch lie.

    Args:
        valid: [B, N], bool: which patches are no padding, in any order.
        lengths: by image, how many of its patches are valid, as numbers.
        prefix: tokens (class, registers) before the patches of each image, valid in all.
    """

    def __init__(self, valid: torch.Tensor, lengths: Sequence[int], prefix: int) -> None:
        before = valid.new_ones(len(valid), prefix)
        self._index = torch.cat((before, valid), 1).flatten().nonzero().squeeze(1)
        self._shape = (len(valid), prefix + valid.shape[1])
        self._prefix = prefix
        offsets = (0, *accumulate(prefix + length for length in lengths))
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=valid.device)
        self.sequences = Sequences(cu_seqlens, offsets, prefix + max(lengths, default=0))

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """The valid tokens of x [B, prefix + N, C], as [1, total, C]."""
        return x.flatten(0, 1).index_select(0, self._index)[None]

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[B, prefix + N, C] of [1, total, C], zeros where nothing is valid."""
        batch, tokens = self._shape
        padded = packed.new_zeros(batch * tokens, packed.shape[-1])
        return padded.index_copy(0, self._index, packed[0]).unflatten(0, self._shape)

    def pack_rope(self, rope: torch.Tensor) -> torch.Tensor:
        """timm's cat(sin, cos) of the patches, [B, 1, N, 2D] or [B, H, N, 2D], as
        `ops.varlen_attention` takes it: [total, 2D] or [H, total, 2D]. The tokens of the prefix,
        which timm does not turn, get sin 0 and cos 1."""
        batch, heads, _, width = rope.shape
        still = rope.new_zeros(width)
        still[width // 2 :] = 1
        every = torch.cat((still.expand(batch, heads, self._prefix, width), rope), 2)
        rows = every.transpose(0, 1).flatten(1, 2).index_select(1, self._index)
        return rows[0] if heads == 1 else rows
