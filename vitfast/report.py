"""The report of a swap: which modules run drop-in layers, which do not, and why."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

AS_TIMM = "runs timm's forward now"
"""How the note of a layer begins that does."""
UNTRUSTED = f"{AS_TIMM}, for want of kernels: "
"""How it begins where the reason is the device and dtype, and nothing about the module."""


@dataclass(frozen=True)
class Swapped:
    """A module that runs a drop-in layer.

    Args:
        path: name in the model, "" for the model itself.
        timm_class, layer_class: class names as users import them.
        role: "block", "attention" or "part".
        note: why it runs timm's forward for now; "" where nothing is in the way.
    """

    path: str
    timm_class: str
    layer_class: str
    role: str
    note: str = ""


@dataclass(frozen=True)
class Skipped:
    """A module that was left alone, and why."""

    path: str
    timm_class: str
    role: str
    reason: str
    by_choice: bool = False  # named in `skip`, or not in `only`


@dataclass
class SwapReport:
    """What `swap` did. Prints as a table; `to_json()` for machines.

    `no_kernels`: why none of vitfast's kernels can run in this process; "" where some can.
    """

    model: str
    swapped: list[Swapped] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    no_kernels: str = ""

    @property
    def counts(self) -> dict[str, int]:
        """Modules swapped and skipped; blocks in all, and swapped."""
        done = sum(entry.role == "block" for entry in self.swapped)
        left = sum(entry.role == "block" for entry in self.skipped)
        return {
            "swapped": len(self.swapped),
            "skipped": len(self.skipped),
            "blocks": done + left,
            "blocks_swapped": done,
        }

    @property
    def gains_nothing(self) -> str:
        """Why the model computes as timm where it is now; "" where a swapped module does not."""
        if not self.swapped:
            return "it holds nothing that could be swapped"
        notes = [entry.note for entry in self.swapped]
        return notes[0] if all(note.startswith(AS_TIMM) for note in notes) else ""

    def to_dict(self) -> dict[str, Any]:
        """The whole report as values that JSON knows."""
        return {
            "model": self.model,
            "counts": self.counts,
            "no_kernels": self.no_kernels,
            "swapped": [asdict(entry) for entry in self.swapped],
            "skipped": [asdict(entry) for entry in self.skipped],
        }

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        lines = [self._headline()]
        if self.swapped:
            rows = [(e.path, e.timm_class, "-> " + e.layer_class, e.note) for e in self.swapped]
            lines += ["", "swapped", *_table(rows)]
        if self.skipped:
            rows = [(e.path, e.timm_class, e.reason, "") for e in self.skipped]
            lines += ["", "left to timm", *_table(rows)]
        return "\n".join(lines)

    def _headline(self) -> str:
        n = self.counts
        if not self.swapped and not self.skipped:
            return f"vitfast: {self.model} holds nothing that vitfast knows; nothing was swapped"
        blocks = f"{n['blocks_swapped']} of {n['blocks']} blocks swapped"
        if not n["blocks"]:
            blocks = "no block that vitfast knows"
        line = f"vitfast: {self.model}: {blocks}, {n['swapped']} modules in all"
        if self.swapped and self.no_kernels:
            return f"{line}; but none of vitfast's kernels can run here: {self.no_kernels}"
        as_timm = sum(entry.note.startswith(AS_TIMM) for entry in self.swapped)
        return f"{line}; {as_timm} of them run timm's forward now" if as_timm else line


def _table(rows: Sequence[tuple[str, str, str, str]]) -> list[str]:
    """Aligned lines of (path, timm class, layer or reason, note).

    Rows whose paths differ only in their indices become one line: blocks.0-11.attn.
    """
    groups: dict[tuple[str, ...], list[list[int]]] = {}
    for path, *rest in rows:
        key = (_INDEX.sub("{}", path), *rest)
        groups.setdefault(key, []).append([int(i) for i in _INDEX.findall(path)])
    lines = []
    for (template, timm_class, target, note), indices in groups.items():
        path = template.format(*(_ranges(slot) for slot in zip(*indices, strict=True)))
        lines.append((path or "(model)", timm_class, target, f"x{len(indices)}", note))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    parts: list[list[int]] = []
    for n in sorted(set(numbers)):
        if parts and n == parts[-1][-1] + 1:
            parts[-1][1:] = [n]
        else:
            parts.append([n])
    return ",".join("-".join(map(str, part)) for part in parts)
