"""Text for people: on a terminal broken between words at its width, in a file or a pipe never."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Sequence

_SHORT = 14
"""Cells of up to so many characters, such as "1.23 ms", are not broken even between words."""


def print_text(text: str) -> None:
    """Print one paragraph."""
    _print([(line, "") for line in _wrapped(text, _width())])


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under a header, or without one where all its names are empty.

    Cells are shown with `str`. On a terminal that is narrower than the table, long cells go on in
    the next line; where that is not enough, every row becomes a paragraph of names and values.
    """
    width = _width()
    cells = [[str(cell) for cell in row] for row in rows]
    widths = _widths(header, cells, width)
    lines = [(line, "bold") for line in _wrapped(title, width)]
    if widths is None:
        lines += [(line, "") for line in _records(header, cells, width)]
    else:
        if any(header):
            lines += [(line, "bold") for line in _columns([header], widths)]
        lines += [(line, "") for line in _columns(cells, widths)]
    _print([*lines, ("", "")])


def _on_terminal() -> bool:
    return sys.stdout.isatty()


def _width() -> int:
    """Characters a line."""
    if not _on_terminal():
        return sys.maxsize
    from rich.console import Console

    return Console().width


def _print(lines: Sequence[tuple[str, str]]) -> None:
    """Lines and their styles, which a file does without."""
    if not _on_terminal():
        for line, _ in lines:
            print(line)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for line, style in lines:
        console.print(Text(line, style), soft_wrap=True)


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of whole words; a word that is longer than a line has one to itself."""
    return textwrap.wrap(
        text, max(width, 1), break_long_words=False, break_on_hyphens=False, initial_indent=indent,
        subsequent_indent=indent,
    ) or [""]  # fmt: skip


def _longest_word(text: str) -> int:
    return max(map(len, text.split()), default=0)


def _widths(header: Sequence[str], cells: list[list[str]], width: int) -> list[int] | None:
    """Of the columns; None where they cannot be made narrow enough."""
    widths, least = [], []
    for i, name in enumerate(header):
        column = [row[i] for row in cells]
        widths.append(max(map(len, [name, *column])))
        unbroken = [len(c) if len(c) <= _SHORT else _longest_word(c) for c in column]
        least.append(max([_longest_word(name), *unbroken]))
    while sum(widths) + 2 * len(widths) > width:
        wide = [(w, i) for i, (w, low) in enumerate(zip(widths, least, strict=True)) if w > low]
        if not wide:
            return None
        widths[max(wide)[1]] -= 1
    return widths


def _columns(lines: Sequence[Sequence[str]], widths: list[int]) -> Iterator[str]:
    for line in lines:
        parts = [_wrapped(cell, width) for cell, width in zip(line, widths, strict=True)]
        for i in range(max(map(len, parts))):
            row = [part[i] if i < len(part) else "" for part in parts]
            yield "  " + "  ".join(map(str.ljust, row, widths)).rstrip()


def _records(header: Sequence[str], cells: list[list[str]], width: int) -> Iterator[str]:
    """A row as its first cell, and below it "name: value" for the rest."""
    for row in cells:
        yield from _wrapped(row[0], width, "  ")
        named = zip(header[1:], row[1:], strict=True)
        pairs = [f"{name}: {value}" if name else value for name, value in named if value]
        line = ""
        for pair in pairs:
            if line and len(f"    {line}, {pair},") > width:
                yield f"    {line},"
                line = ""
            line += ", " * bool(line) + pair
        yield from _wrapped(line, width, "    ")
