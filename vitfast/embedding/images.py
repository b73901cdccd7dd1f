"""Folders of images, and how images are named."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitfast.errors import InputTypeError, InputValueError

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".webp",
    ".avif", ".jp2", ".j2k", ".jxl", ".heic", ".heif", ".ppm", ".pgm", ".pbm", ".pnm", ".tga",
)  # fmt: skip
"""What a file in a folder is taken for an image by. Some need a plugin of Pillow: without it they
are reported, where leaving them out would say nothing."""


def find_images(
    folder: str | os.PathLike[str], *, recursive: bool = True
) -> list[tuple[str, Path]]:
    """(id, path) of every image file of a folder, sorted by id.

    The id is the path relative to the folder, with "/" between its parts on every system; bytes
    that are no UTF-8 are written as backslash escapes. Files are known by their suffix (in either
    case); hidden files and folders are left out, and links to folders are not followed.

    Raises:
        InputValueError: there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputValueError(
            f"{root}: {'a file, no folder' if root.exists() else 'no such folder'}"
        )
    found = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                path = Path(parent, name)
                relative = path.relative_to(root).as_posix()
                found.append((os.fsencode(relative).decode("utf-8", "backslashreplace"), path))
    return sorted(found)


def said(image: Any, place: int) -> str:
    """How an error names one of several images."""
    name = f" ({os.fspath(image)!s})" if isinstance(image, (str, os.PathLike)) else ""
    return f"image {place}{name}"


def check_ids(ids: Sequence[Any]) -> None:
    """Raises for the first id that is no string, is empty, or is there twice."""
    seen: set[str] = set()
    for one in ids:
        check_id(one, seen)


def check_id(one: Any, seen: set[str]) -> None:
    """As `check_ids`, of the next of them; it is added to `seen`.

    Raises:
        InputTypeError: it is no string.
        InputValueError: it is empty, or was there before.
    """
    if not isinstance(one, str):
        raise InputTypeError(f"ids are strings, got {one!r}")
    if not one or one in seen:
        raise InputValueError(f"the id {one!r} is there twice" if one else "an id is empty")
    seen.add(one)
