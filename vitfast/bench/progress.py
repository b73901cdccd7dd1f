"""A progress bar on stderr for people at a terminal; silence in files and pipes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: float) -> Iterator[Callable[[str, float], None]]:
    """Yields a call: (what is going on, how much of `total` is done).

    Nothing is drawn, and rich is not imported, unless stderr is a terminal. The bar is gone when
    the work ends or is interrupted.
    """
    if not sys.stderr.isatty():
        yield lambda text, done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda text, done: bar.update(task, description=text[:48], completed=done)
