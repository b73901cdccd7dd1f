"""Where tiles lie on an image, and which cells of the output they and their neighbours fill.

Everything here is whole numbers and fractions: no image, no model, no tensor.
"""

from __future__ import annotations

import math
from fractions import Fraction
from numbers import Real
from typing import NamedTuple

from vitfast.errors import InputTypeError, InputValueError


class Box(NamedTuple):
    """Pixels of the image: rows [top, bottom), columns [left, right)."""

    top: int
    left: int
    bottom: int
    right: int

    def __str__(self) -> str:
        return f"rows {self.top}:{self.bottom}, columns {self.left}:{self.right}"


class Axis(NamedTuple):
    """The tiles along one side of an image, and the output's cells there.

    A band is what becomes final with a tile: the cells from its own first to the next tile's.
    """

    length: int
    """Pixels of the image; the last window may reach past them, into padding."""
    window: int
    """Pixels of every tile."""
    starts: tuple[int, ...]
    """First pixel of each tile; increasing, the first 0."""
    ratio: Fraction
    """Cells of the output per pixel. Starts and window are a whole number of cells."""

    @property
    def cells(self) -> int:
        """Cells of a tile."""
        return int(self.window * self.ratio)

    @property
    def total(self) -> int:
        """Cells of the output; one that only part of a patch falls into counts."""
        return math.ceil(self.length * self.ratio)

    def first(self, tile: int) -> int:
        """A tile's first cell."""
        return int(self.starts[tile] * self.ratio)

    def pixels(self, tile: int) -> tuple[int, int]:
        """A tile's pixels [first, last) within the image."""
        start = self.starts[tile]
        return start, min(start + self.window, self.length)

    def band(self, tile: int) -> tuple[int, int]:
        """The cells [first, last) of a tile's band."""
        is_last = tile + 1 == len(self.starts)
        return self.first(tile), self.total if is_last else self.first(tile + 1)

    def contributors(self, band: int) -> range:
        """The tiles that cover some of a band's cells."""
        low, high = self.band(band)
        tiles = range(len(self.starts))
        covering = [t for t in tiles if self.first(t) < high and self.first(t) + self.cells > low]
        return range(covering[0], covering[-1] + 1)


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is no less than the value."""
    return -(-value // multiple) * multiple


def window_of(length: int, tile: int, multiple: int) -> int:
    """The side of a window: the tile's, cut to a multiple, or the image's where that is less.

    Raises:
        InputValueError: the tile is smaller than the multiple.
    """
    if tile < multiple:
        raise InputValueError(
            f"tile={tile} is less than the {multiple} pixels of which the model takes multiples"
        )
    return min(tile // multiple * multiple, round_up(length, multiple))


def starts_of(length: int, window: int, overlap: float, multiple: int) -> tuple[int, ...]:
    """First pixels of the windows that cover an image's side, each overlapping the one before.

    Neighbours share at least `overlap` of a window, as far as windows that lie on multiples can:
    they move on by one multiple at least. The last one is moved inwards, so that it is as large as
    the others; only where the image's side is no multiple does it reach past the edge, by less
    than one multiple (or where one window is larger than the image).

    Args:
        length, window: pixels; the window is of that multiple.
        overlap: from 0 to below 1.
        multiple: pixels; every start is one of it.
    """
    last = max(round_up(length, multiple) - window, 0)
    step = max(math.floor(round(window * (1 - overlap) / multiple, 9)) * multiple, multiple)
    return (*range(0, last, step), last)


def check_tile(tile: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a tile given as a number or as both.

    Raises:
        InputTypeError, InputValueError: neither, or below 1.
    """
    sides = tuple(tile) if isinstance(tile, (tuple, list)) else (tile, tile)
    if len(sides) != 2 or not all(isinstance(s, int) and not isinstance(s, bool) for s in sides):
        raise InputTypeError(f"tile is pixels, or a pair (height, width) of them, not {tile!r}")
    if min(sides) < 1:
        raise InputValueError(f"tile={tile!r} has a side below 1 pixel")
    return sides[0], sides[1]


def check_overlap(overlap: float) -> float:
    """The share of a tile that its neighbour shares.

    Raises:
        InputTypeError, InputValueError: no number, or not from 0 to below 1.
    """
    if not isinstance(overlap, Real) or isinstance(overlap, bool):
        raise InputTypeError(f"overlap is a share of the tile, from 0 to below 1, not {overlap!r}")
    if not 0 <= overlap < 1:
        raise InputValueError(
            f"overlap={overlap} must be a share of the tile, from 0 to below 1 (0.1 is a tenth)"
        )
    return float(overlap)
