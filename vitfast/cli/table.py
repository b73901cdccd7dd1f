"""Tables for people: rich on a terminal, aligned plain text in a file or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under a header, or without one where all its names are empty.

    Cells are shown with `str`; columns are as wide as they need.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_rich(title, header, cells)
        return
    lines = [list(header), *cells] if any(header) else cells
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    print(title)
    for line in lines:
        print("  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())
    print()


def _print_rich(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD if any(header) else None,
        show_header=any(header),
    )
    for i, name in enumerate(header):
        table.add_column(name, style="cyan" if i == 0 else None, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    console.print(table)
    if not any(header):
        console.print()
