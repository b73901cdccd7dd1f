"""Whether a TIFF file holds the pixels that its header promises.

libvips gives white for what a cut-off TIFF lacks, whatever it is told about failing; so the header
is read here, before any pixel is.
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

_OFFSETS, _COUNTS = (273, 324), (279, 325)
"""Tags of where strips, or tiles, lie, and of how many bytes each has."""
_FORMATS = {3: "H", 4: "I", 16: "Q"}
"""TIFF's types of whole numbers, as `struct` calls them."""


def is_cut_off(path: str) -> bool:
    """Whether pixels, or the header, of a file's first page lie behind its end; False of a file
    that is no TIFF."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        magic = file.read(4)
        if magic not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return False
        try:
            tags = _tags(file, "<" if magic[:1] == b"I" else ">", b"+" in magic)
        except (struct.error, OverflowError, MemoryError):  # fewer bytes than are needed
            return True
    for offsets, counts in zip(_OFFSETS, _COUNTS, strict=True):
        for first, count in zip(tags.get(offsets, ()), tags.get(counts, ()), strict=False):
            if first + count > size:
                return True
    return False


def _tags(file: BinaryIO, order: str, is_big: bool) -> dict[int, tuple[int, ...]]:
    """The whole numbers among the first page's tags that say where its pixels lie."""

    def read(format: str) -> tuple[int, ...]:
        return struct.unpack(order + format, file.read(struct.calcsize(order + format)))

    if is_big:
        read("HH")  # the size of offsets, and nothing
    word, entries, inline = ("Q", "Q", 8) if is_big else ("I", "H", 4)
    file.seek(read(word)[0])
    found = {}
    for _ in range(read(entries)[0]):
        tag, kind, count = read("HH" + word)
        here = file.tell()
        if tag in (*_OFFSETS, *_COUNTS) and kind in _FORMATS:
            format = f"{count}{_FORMATS[kind]}"
            if struct.calcsize(order + format) > inline:
                file.seek(read(word)[0])
            found[tag] = read(format)
        file.seek(here + inline)
    read(word)  # where the next page lies: the last bytes of the header
    return found
