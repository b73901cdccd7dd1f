"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str], *, on_disk: bool = False) -> Iterator[Path]:
    """Yields a name beside `path` to write to, `.<name>.<process>.tmp`; what is there at the end
    takes `path`'s name at once, in place of what had it. After an exception nothing has changed.

    Args:
        on_disk: have the disk keep the bytes before the name changes, which outlasts a power cut.
    """
    target = Path(path).absolute()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if on_disk:
            sync(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the disk keep a file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
