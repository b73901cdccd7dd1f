"""A progress bar of tiles on stderr, for people at a terminal; or what a caller has instead."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], object]
"""(tiles done, of how many)."""


@contextmanager
def tile_bar(progress: bool | Progress, total: int) -> Iterator[Callable[[int], None]]:
    """Yields what is told of each few tiles that are done.

    True draws a bar only if stderr is a terminal; it is gone when the work ends or is interrupted.
    """
    if callable(progress):
        yield _counted(progress, total)
    elif not progress or not sys.stderr.isatty():
        yield lambda count: None
    else:
        from rich import progress as bars
        from rich.console import Console

        columns = (
            bars.TextColumn("tiles"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeRemainingColumn(),
        )
        with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("tiles", total=total)
            yield lambda count: bar.advance(task, count)


def _counted(progress: Progress, total: int) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return advance
