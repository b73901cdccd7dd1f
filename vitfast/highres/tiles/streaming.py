"""One image through a model, row of tiles by row of tiles: finished bands come out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Set
from fractions import Fraction
from typing import Any, NamedTuple

import torch

from vitfast.errors import InputTypeError, InputValueError, VitfastError, first_line
from vitfast.highres.tiles.blending import BLENDS, Blend, StripeMerger, WeightedMean
from vitfast.highres.tiles.outputs import BadOutputError, Geometry, Predictor, RefusedTileError
from vitfast.highres.tiles.sources import Source
from vitfast.highres.tiles.tiling import Axis, Box, starts_of, window_of


class FailedTile(NamedTuple):
    """A tile for which the model raised."""

    row: int
    column: int
    box: Box
    """Its pixels."""
    error: Exception
    frame: int | None = None
    """Of a video."""

    def __str__(self) -> str:
        what = f"{type(self.error).__name__}: {first_line(self.error)}"
        frame = "" if self.frame is None else f"frame {self.frame}, "
        return f"{frame}row {self.row}, column {self.column} ({self.box}): {what}"


class TilingError(VitfastError, RuntimeError):
    """The model raised for some tiles; everything else was computed.

    Attributes:
        failed: the tiles, a tuple of `FailedTile`.
        values: the result, or `out`, with NaN where no other tile covers a failed one. None where
            regions were yielded.
    """

    def __init__(self, failed: tuple[FailedTile, ...], tiles: int | None, values: Any = None):
        self.failed, self.values = failed, values
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        of = "" if tiles is None else f" of {tiles}"
        super().__init__(f"{len(failed)}{of} tiles failed: {failed[0]}{more}")


class Band(NamedTuple):
    """What a row of tiles finished."""

    number: int
    rows: tuple[int, int]
    """Of the output's map."""
    values: torch.Tensor
    """[C, rows, columns], or [C] of a pooled output: the mean over the row's tiles."""
    failed: tuple[FailedTile, ...]
    """The failed tiles that cover some of it."""
    weight: float = 1.0
    """Of a pooled output: pixels that the row stands for."""


class Plan(NamedTuple):
    """How an image is cut, and what becomes of its tiles."""

    source: Source
    predictor: Predictor
    rows: Axis
    columns: Axis
    geometry: Geometry
    batch: int
    blend: Blend

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the output."""
        if self.geometry.ratio is None:
            return (self.geometry.channels,)
        return self.geometry.channels, self.rows.total, self.columns.total

    @property
    def bands(self) -> int:
        return len(self.rows.starts)

    @property
    def tiles(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)

    def needed(self, wanted: Set[int]) -> set[int]:
        """The rows of tiles that the wanted bands take."""
        if self.geometry.ratio is None:
            return set(wanted)
        return {row for band in wanted for row in self.rows.contributors(band)}

    def run(self, wanted: Set[int], advance: Callable[[int], None]) -> Iterator[Band]:
        """The wanted bands from top to bottom. Each comes out the same, to the last bit, whichever
        others are wanted: no batch spans two rows of tiles.

        Args:
            advance: told how many tiles more are done.
        """
        needed = self.needed(wanted)
        pooled = self.geometry.ratio is None
        merger = None
        if not pooled:
            merger = StripeMerger(self.geometry.channels, self.rows, self.columns, self.blend)
        areas = [self.blend.areas(axis) for axis in (self.rows, self.columns)]
        failed: dict[int, list[FailedTile]] = {}
        for row in range(self.bands):
            failed[row] = []
            mean = WeightedMean((self.geometry.channels,), (), torch.float64)
            for column, values in self._row(row, failed[row], advance) if row in needed else ():
                if merger is None:
                    mean.add(values, areas[0][row] * areas[1][column])
                else:
                    merger.add(row, column, values)
            if merger is None:
                if row in wanted:
                    rows = self.rows.band(row)
                    yield Band(row, rows, mean.mean, tuple(failed[row]), float(mean.weight))
                continue
            values = merger.band(row)
            if row in wanted:
                touching = [f for r in self.rows.contributors(row) for f in failed[r]]
                values = values.to(self.geometry.dtype)
                yield Band(row, self.rows.band(row), values, tuple(touching))

    def _row(
        self, row: int, failed: list[FailedTile], advance: Callable[[int], None]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(column, output) of the tiles of a row that the model did not fail for."""
        top, bottom = self.rows.pixels(row)
        stripe = self.source.rows(top, bottom)
        columns = range(len(self.columns.starts))
        for first in columns[:: self.batch]:
            chunk = columns[first : first + self.batch]
            yield from self._found(row, stripe, chunk, failed).items()
            advance(len(chunk))

    def _found(
        self, row: int, stripe: torch.Tensor, chunk: range, failed: list[FailedTile]
    ) -> dict[int, torch.Tensor]:
        """Column -> output of some tiles; of those that the model raises for, the failure."""
        try:
            return self._predict(stripe, chunk)
        except Exception as error:
            if len(chunk) == 1:
                failed.append(self._failure(row, chunk[0], error))
                return {}
        found: dict[int, torch.Tensor] = {}
        for column in chunk:  # which of them was it?
            found |= self._found(row, stripe, range(column, column + 1), failed)
        return found

    def _failure(self, row: int, column: int, error: Exception) -> FailedTile:
        top, bottom = self.rows.pixels(row)
        left, right = self.columns.pixels(column)
        # Its traceback holds the frames of the model's call, and with them its activations.
        return FailedTile(row, column, Box(top, left, bottom, right), error.with_traceback(None))

    def _predict(self, stripe: torch.Tensor, chunk: range) -> dict[int, torch.Tensor]:
        """Column -> output, of some tiles of a stripe [C, rows, width]."""
        size = (self.rows.window, self.columns.window)
        pixels = torch.zeros(
            (len(chunk), len(stripe), *size), dtype=stripe.dtype, device=stripe.device
        )
        valid = []
        for tile, column in zip(pixels, chunk, strict=True):
            left, right = self.columns.pixels(column)
            valid.append((stripe.shape[1], right - left))
            tile[:, : stripe.shape[1], : right - left] = stripe[..., left:right]
        found = self.predictor(pixels, valid)
        wanted: tuple[int, ...] = (self.geometry.channels,)
        if self.geometry.ratio is not None:
            wanted = (*wanted, self.rows.cells, self.columns.cells)
        if found.shape[1:] != wanted:
            raise BadOutputError(
                f"the output is {list(found.shape[1:])}, that of other tiles {list(wanted)}"
            )
        return dict(zip(chunk, found, strict=True))


class Whole(NamedTuple):
    """An image that one call took as it is: no tiles, no weights."""

    source: Source
    values: torch.Tensor
    bands: int = 1
    tiles: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def needed(self, wanted: Set[int]) -> Set[int]:
        return wanted

    def run(self, wanted: Set[int], advance: Callable[[int], None]) -> Iterator[Band]:
        """As `Plan.run`: the one band, if it is wanted."""
        if wanted:
            advance(1)
            rows = self.shape[1] if len(self.shape) == 3 else 0
            yield Band(0, (0, rows), self.values, ())


def plan_tiles(
    source: Source,
    predictor: Predictor,
    tile: tuple[int, int],
    overlap: float,
    stride: int | None,
    batch: int,
    blend: Blend,
) -> Plan | Whole:
    """How a source goes through a model: in one call if that takes it, else by tiles.

    Raises:
        InputTypeError, InputValueError, UnsupportedInputError: options that cannot be, or a model
            that takes no such tiles or gives no output that can be merged.
    """
    for name, value, least in (("batch", batch, 1), ("stride", stride, 1), ("margin", blend[1], 0)):
        if value is None and name != "batch":
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise InputTypeError(f"{name} is a whole number, not {value!r}")
        if value < least:
            raise InputValueError(f"{name}={value} must be at least {least}")
    if blend.kind not in BLENDS:
        raise InputValueError(f"blend={blend.kind!r} is none of {', '.join(BLENDS)}")
    if source.height <= tile[0] and source.width <= tile[1]:
        whole = _whole(source, predictor)
        if whole is not None:
            return whole
    multiple = predictor.multiple if stride is None else (stride, stride)
    window, multiple, geometry = _fit(source, predictor, tile, multiple)
    ratio = geometry.ratio or (Fraction(1), Fraction(1))
    rows, columns = (
        Axis(length, side, starts_of(length, side, overlap, m), r)
        for length, side, m, r in zip(
            (source.height, source.width), window, multiple, ratio, strict=True
        )
    )
    blend.check(rows)
    blend.check(columns)
    return Plan(source, predictor, rows, columns, geometry, batch, blend)


def _whole(source: Source, predictor: Predictor) -> Whole | None:
    """The image in one call; None where the model does not take its size (or fails for it, which
    the one tile that it then becomes will show)."""
    pixels = source.rows(0, source.height)[None]
    try:
        found = predictor(pixels)
    except (BadOutputError, torch.OutOfMemoryError):
        raise
    except Exception:
        return None
    return Whole(source, found[0].clone())


def _fit(
    source: Source, predictor: Predictor, tile: tuple[int, int], multiple: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int], Geometry]:
    """(window, multiple, geometry): tiles that the model takes and that are whole cells.

    The model is asked at a whole tile first, where a stride shows more clearly than at the side of
    a small image.
    """

    def measured(window: tuple[int, int]) -> Geometry:
        shape = (1, source.channels, *window)
        return predictor.measure(torch.zeros(shape, dtype=source.dtype, device=source.device))

    whole = (window_of(tile[0], tile[0], multiple[0]), window_of(tile[1], tile[1], multiple[1]))
    geometry = measured(whole)
    if geometry.ratio is not None:
        down, across = (r.denominator for r in geometry.ratio)
        multiple = (math.lcm(multiple[0], down), math.lcm(multiple[1], across))
    window = (
        window_of(source.height, tile[0], multiple[0]),
        window_of(source.width, tile[1], multiple[1]),
    )
    ratio = geometry.ratio
    if window != whole:
        try:
            geometry = measured(window)
        except RefusedTileError:  # a model of a fixed size: the image is padded to a whole tile
            window = whole
    if geometry.ratio != ratio or not geometry.is_exact:
        raise BadOutputError(
            f"the output's size is no fixed fraction of the tile's: for tiles of {window[0]} x "
            f"{window[1]} pixels it is not {ratio and ' x '.join(map(str, ratio))} of that"
        )
    return window, multiple, geometry
