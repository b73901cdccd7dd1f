"""Rows as a table for people: one line a case, peers side by side."""

from __future__ import annotations

from collections.abc import Sequence

from vitfast.bench.peers import NOT_SWAPPED
from vitfast.bench.record import Result, Row

MISSING = "-"
"""The cell of what was not measured."""


def milliseconds(value: float) -> str:
    """Three digits with the unit that suits: "183 us", "2.41 ms", "7.40 s"."""
    for limit, scale, unit in ((1.0, 1e3, "us"), (1e3, 1.0, "ms")):
        if value < limit * 0.9995:
            return f"{digits(value * scale)} {unit}"
    return f"{digits(value / 1e3)} s"


def digits(value: float) -> str:
    """Three significant digits without an exponent."""
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def megabytes(value: float | None) -> str:
    """A whole number of MB, or "-" where it was not measured."""
    return MISSING if value is None else f"{value:.0f}"


def table(
    rows: Sequence[Row], names: Sequence[str]
) -> tuple[tuple[str, ...], list[tuple[str, ...]], list[str]]:
    """Header, a line of cells for each row, and notes that go below the table.

    A peer's cell is its median and, in brackets, how many times faster vitfast is; the median alone
    where nothing was swapped.

    Args:
        names: peers in the order of their columns; one that has no time at all has no column.
    """
    shown = [n for n in names if any(_median(row, n) is not None for row in rows)]
    header = (
        "case", "shape", "dtype", "pass", *shown, "vitfast", "rate", "of floor",
        *(f"MB {name}" for name in (*names[:1], "vitfast")), "MB floor", "error/budget",
    )  # fmt: skip
    notes: list[str] = []
    cells = []
    for row in rows:
        peers = []
        for name in names:
            result = row.results.get(name, Result(reason="not measured"))
            ratio = row.ratio(name)
            cell = MISSING
            if result.median_ms is None:
                _note(notes, f"{name}: {result.reason}")
            else:
                cell = milliseconds(result.median_ms)
            if ratio is not None:
                cell += f" ({digits(ratio)}x)"
            if name in shown:
                peers.append(cell)
        if row.note:
            _note(notes, f"{row.case}: {row.note}")
        ours = row.results["vitfast"]
        memory = [
            megabytes(row.results[name].peak_mb if name in row.results else None)
            for name in (*names[:1], "vitfast")
        ]
        cells.append(
            (
                row.case, row.shape, row.dtype, row.passes, *peers,
                _ours(ours) + (f" {row.backend}" if row.backend else ""),
                f"{digits(row.rate)} {row.unit}" if row.rate else MISSING,
                f"{row.floor_share:.0%}" if row.floor_share else MISSING, *memory,
                megabytes(row.memory_floor_mb),
                MISSING if ours.error_over_budget is None else f"{ours.error_over_budget:.2f}",
            )
        )  # fmt: skip
    unknown = list(dict.fromkeys(row.case for row in rows if not row.swapped))
    if unknown:
        notes.append(f"{NOT_SWAPPED}: vitfast found nothing to replace in {', '.join(unknown)}")
    return header, cells, notes


def _ours(result: Result) -> str:
    return result.reason or MISSING if result.median_ms is None else milliseconds(result.median_ms)


def _median(row: Row, name: str) -> float | None:
    return row.results[name].median_ms if name in row.results else None


def _note(notes: list[str], text: str) -> None:
    if text not in notes:
        notes.append(text)
