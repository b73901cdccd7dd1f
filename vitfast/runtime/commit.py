"""The commit that vitfast runs from, for records of what it measured or computed."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

import vitfast


@functools.cache
def commit() -> str | None:
    """The commit that vitfast runs from, "+" appended where files changed; None if installed."""
    package = Path(vitfast.__file__).resolve().parent
    try:
        top = _git(package, "rev-parse", "--show-toplevel")
        if Path(top).resolve() / "vitfast" != package:
            return None  # installed below some other checkout
        dirty = _git(package, "status", "--porcelain", "--untracked-files=no")
        return _git(package, "rev-parse", "--short=12", "HEAD") + ("+" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=10,
    )
    return done.stdout.strip()
