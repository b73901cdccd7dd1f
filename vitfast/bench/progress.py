"""A progress bar on stderr for people at a terminal; silence in files and pipes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, float], None]
"""(what is going on, how much of the work is done) -> nothing."""


@contextmanager
def progress_bar(total: float) -> Iterator[Progress]:
    """Yields what moves the bar, which is full at `total`.

    Nothing is drawn, and rich is not imported, unless stderr is a terminal. The bar is gone when
    the work ends or is interrupted.
    """
    if not sys.stderr.isatty():
        yield lambda text, done: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda text, done: bar.update(task, description=text[:48], completed=done)


def of_part(progress: Progress, part: int, case: int = 0, cases: int = 1) -> Progress:
    """Progress within one of the `cases` of equal size in a part; every part counts 1.

    The result takes the share of the case that is done, from 0 to 1.
    """

    def show(text: str, share: float) -> None:
        progress(text, part + (case + min(share, 1.0)) / cases)

    return show
