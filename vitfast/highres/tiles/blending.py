"""How tiles that overlap become one map: weights, and a merger that holds one stripe of it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from vitfast.errors import InputValueError
from vitfast.highres.tiles.tiling import Axis

BLENDS = ("cosine", "average")

_LEAST = 2.0**-24
"""Weight of a cell that is not to count, unless no other tile gives it: half of float32's epsilon,
so that a neighbour of weight 1 leaves nothing of it, and a failed one everything."""


class Blend(NamedTuple):
    """How tiles weigh where they overlap."""

    kind: str = "cosine"
    """One of `BLENDS`."""
    margin: int | None = None
    """Pixels along a tile's edge, where that is not the image's, that are not to count; None for a
    quarter of what is shared with the neighbour there ("cosine"), or none ("average")."""

    def weights(self, axis: Axis, tile: int) -> torch.Tensor:
        """What a tile's cells weigh along one axis: float32 [axis.cells], all above 0.

        "cosine" is a raised cosine, sin^2(pi/2 * (i + 1/2) / n), over the n cells between the
        margins of both neighbours, and its mirror image on the other side: the weights of two tiles
        that meet add up to 1. At the image's own edges nothing fades. A tile's weight in two
        dimensions is the product of both axes'.
        """
        cells = torch.ones(axis.cells, dtype=torch.float64, device="cpu")
        position = torch.arange(axis.cells, dtype=torch.float64, device="cpu") + 0.5
        for neighbour, at in ((tile - 1, position), (tile + 1, axis.cells - position)):
            if not 0 <= neighbour < len(axis.starts):
                continue
            shared = max(axis.cells - abs(axis.first(tile) - axis.first(neighbour)), 0)
            margin = self._margin(axis, shared)
            if self.kind == "cosine" and shared > 2 * margin:
                share = ((at - margin) / (shared - 2 * margin)).clamp(0, 1)
                cells *= torch.sin(torch.pi / 2 * share).square()
            else:
                cells *= at > margin
        return cells.clamp(min=_LEAST).float()

    def _margin(self, axis: Axis, shared: int) -> int:
        if self.margin is None:
            return shared // 4 if self.kind == "cosine" else 0
        return math.ceil(self.margin * axis.ratio)

    def check(self, axis: Axis) -> None:
        """Raises:
        InputValueError: neighbours overlap by less than both their margins.
        """
        for tile in range(1, len(axis.starts)):
            shared = axis.cells - (axis.first(tile) - axis.first(tile - 1))
            if self.margin is not None and shared < 2 * self._margin(axis, shared):
                raise InputValueError(
                    f"margin={self.margin} takes an overlap of twice that; tiles share "
                    f"{int(shared / axis.ratio)} pixels"
                )

    def areas(self, axis: Axis) -> torch.Tensor:
        """How many of an image's cells along one axis each tile stands for: float64 [tiles].

        A cell that several tiles cover is divided among them by their weights, and padding counts
        for nothing: the sum is `axis.total`.
        """
        weights = [self.weights(axis, t).double() for t in range(len(axis.starts))]
        size = axis.first(len(weights) - 1) + axis.cells
        covered = torch.zeros(size, dtype=torch.float64, device="cpu")
        for t, weight in enumerate(weights):
            covered[axis.first(t) : axis.first(t) + axis.cells] += weight
        shares = []
        for t, weight in enumerate(weights):
            low = axis.first(t)
            high = min(low + axis.cells, axis.total)
            shares.append((weight[: high - low] / covered[low:high]).sum())
        return torch.stack(shares)


class WeightedMean:
    """A weighted mean that grows by one value after another.

    It moves towards each new value by the value's share of the weight so far, instead of dividing
    a sum at the end: values that agree then come out exactly, to the last bit.
    """

    def __init__(self, shape: tuple[int, ...], weight_shape: tuple[int, ...], dtype: torch.dtype):
        self.mean = torch.zeros(shape, dtype=dtype, device="cpu")
        self.weight = torch.zeros(weight_shape, dtype=dtype, device="cpu")

    def add(self, values: torch.Tensor, weight: torch.Tensor, columns: slice | None = None) -> None:
        """Take values in, of weights above 0; of a map, at these columns."""
        mean, total = self.mean, self.weight
        if columns is not None:
            mean, total = mean[..., columns], total[..., columns]
        total += weight
        values = values.to(mean.dtype)
        step = (values - mean) * (weight / total)
        mean += step.masked_fill_(values == mean, 0)  # infinities that agree, too


class StripeMerger:
    """Merges the tiles of a map from top to bottom, in float32, and hands on rows that are done.

    It holds as many rows as a tile has: memory is C x tile rows x map columns x 4 bytes, however
    tall the map is.

    Args:
        channels: C.
        rows, columns: of cells, see `Axis`.
        blend: the weights.
    """

    def __init__(self, channels: int, rows: Axis, columns: Axis, blend: Blend) -> None:
        self._rows, self._columns = rows, columns
        width = columns.first(len(columns.starts) - 1) + columns.cells
        size = (rows.cells, width)
        self._stripe = WeightedMean((channels, *size), size, torch.float32)
        self._top = 0
        self._row_weights = [blend.weights(rows, r) for r in range(len(rows.starts))]
        self._column_weights = [blend.weights(columns, c) for c in range(len(columns.starts))]

    def add(self, row: int, column: int, values: torch.Tensor) -> None:
        """Take in the output [C, tile rows, tile columns] of one tile.

        The rows above the tile's first must have been handed on before.
        """
        assert self._rows.first(row) == self._top
        left = self._columns.first(column)
        weight = torch.outer(self._row_weights[row], self._column_weights[column])
        self._stripe.add(values, weight, slice(left, left + self._columns.cells))

    def band(self, row: int) -> torch.Tensor:
        """The band [C, rows of the band, columns of the map] of a row of tiles, when all tiles of
        that row and the rows before were added. Cells that no tile gave are NaN."""
        low, high = self._rows.band(row)
        assert low == self._top
        mean, weight = self._stripe.mean, self._stripe.weight
        count = high - low
        band = mean[:, :count, : self._columns.total].clone()
        band.masked_fill_(weight[:count, : self._columns.total] == 0, torch.nan)
        for held in (mean, weight):
            kept = held[..., count:, :].clone()
            held.zero_()
            held[..., : kept.shape[-2], :] = kept
        self._top = high
        return band
