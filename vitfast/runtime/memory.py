"""How much memory this process may use: the machine's, or what its container is given of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def available(root: Path = Path("/")) -> int:
    """Bytes: the least of the machine's memory and the limits of the control groups that this
    process is in, of version 1 or 2.

    Args:
        root: the directory that holds /proc and /sys.
    """
    return min([_machine(), *_limits(root)])


def _machine() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 16 << 30


def _limits(root: Path) -> Iterator[int]:
    """Those of a group count for all that are in it. In a container the group may be mounted as if
    it were the root of them all, whatever path it is said to have."""
    mounted = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            places, name = (mounted, mounted / "unified"), "memory.max"
        elif "memory" in controllers.split(","):
            places, name = (mounted / "memory", mounted / controllers), "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for place in places:
            for level in (group, *group.parents):
                found = _read(place / level / name).strip()
                if found.isdigit():  # version 2 says "max" for none, version 1 a huge number
                    yield int(found)


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
