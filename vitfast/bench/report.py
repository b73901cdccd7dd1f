"""Rows as a table for people: one line a case, peers side by side."""

from __future__ import annotations

from collections.abc import Sequence

from vitfast.bench.record import Result, Row

MISSING = "-"


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
    return MISSING if value is None else f"{value:.0f}"


def table(
    rows: Sequence[Row], names: Sequence[str]
) -> tuple[tuple[str, ...], list[tuple[str, ...]], list[str]]:
    """Header, cells and notes.

    A peer's cell is its median and, in brackets, how many times faster vitfast is.
    """
    shown = [n for n in names if any(row.ratio(n) is not None for row in rows)]
    header = (
        "case", "shape", "dtype", "pass", *shown, "vitfast", "rate", "of floor",
        *(f"MB {name}" for name in (*names[:1], "vitfast")), "error/budget",
    )  # fmt: skip
    notes: list[str] = []
    cells = []
    for row in rows:
        peers = []
        for name in names:
            result = row.results.get(name, Result(reason="not measured"))
            ratio = row.ratio(name)
            cell = MISSING
            if ratio is None:
                _note(notes, f"{name}: {result.reason}")
            else:
                cell = f"{milliseconds(result.median_ms or 0.0)} ({digits(ratio)}x)"
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
                milliseconds(ours.median_ms or 0.0) + (f" {row.backend}" if row.backend else ""),
                f"{digits(row.rate)} {row.unit}" if row.rate else MISSING,
                f"{row.floor_share:.0%}" if row.floor_share else MISSING, *memory,
                MISSING if ours.error_over_budget is None else f"{ours.error_over_budget:.2f}",
            )
        )  # fmt: skip
    return header, cells, notes


def _note(notes: list[str], text: str) -> None:
    if text not in notes:
        notes.append(text)
