"""Records of measurements: rows, the JSON file around them, and the comparison of two files."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vitfast.bench.timer import Timing
from vitfast.errors import InputValueError
from vitfast.runtime.files import whole_file

SCHEMA = 1
WORSE = 0.10
"""A ratio that fell by more than this share is a regression."""


@dataclass
class Result:
    """One contender in one row.

    Args:
        median_ms, q1_ms, q3_ms: median and quartiles of the time of one call; None where it was not
            timed, and `reason` says why.
        peak_mb: of memory, in MB (10^6 bytes).
        error_over_budget: 1 is the limit.
        gflops, gbs: the case's work by this contender's time, in GFLOP/s and GB/s.
        floor_share: the floor's time over this contender's: 1 is the best that this machine does.
    """

    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    rounds: int = 0
    peak_mb: float | None = None
    error_over_budget: float | None = None
    gflops: float | None = None
    gbs: float | None = None
    floor_share: float | None = None
    reason: str = ""

    @classmethod
    def of(cls, timing: Timing, **more: Any) -> Result:
        """The result of a timing; `more` are fields by name."""
        low, high = timing.quartiles
        return cls(timing.median * 1e3, low * 1e3, high * 1e3, len(timing.samples), **more)


@dataclass
class Row:
    """One case: what ran, each contender's result, and what vitfast's time comes to.

    Args:
        level: "ops", "blocks" or "models".
        passes: "infer" or "train".
        rate, unit, floor_share: of the vitfast contender, in the unit of the ceiling that binds.
        backend: what vitfast picked, where a single op ran.
        memory_floor_mb: of a model's inference; see `vitfast.bench.memory_floor`.
        note: how a number was obtained, or why it is missing.
    """

    level: str
    case: str
    shape: str
    dtype: str
    passes: str
    device: str
    results: dict[str, Result] = field(default_factory=dict)
    rate: float | None = None
    unit: str = ""
    floor_share: float | None = None
    memory_floor_mb: float | None = None
    backend: str = ""
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What two rows of the same case have in common, in whatever file they are."""
        return (self.level, self.case, self.shape, self.dtype, self.passes, self.device)

    @property
    def swapped(self) -> bool:
        """Whether vitfast was timed: of a model that it does not know, nothing is swapped."""
        return self.results["vitfast"].median_ms is not None

    def ratio(self, peer: str, of: str = "vitfast") -> float | None:
        """How many times faster vitfast (or another contender) is than this peer."""
        ours, theirs = self.results.get(of), self.results.get(peer)
        if ours is None or theirs is None or not ours.median_ms or theirs.median_ms is None:
            return None
        return theirs.median_ms / ours.median_ms

    def ratios(self, of: str = "vitfast") -> dict[str, float]:
        """Peer -> `ratio`, for all that have one."""
        found = {peer: self.ratio(peer, of) for peer in self.results if peer != "vitfast"}
        return {peer: ratio for peer, ratio in found.items() if ratio is not None}

    def as_json(self) -> dict[str, Any]:
        """As values that JSON knows, with the ratios."""
        return {**asdict(self), "ratios": self.ratios()}


def document(kind: str, machine: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What a results file holds: which command wrote it, when and where, and what it found.

    Args:
        kind: the command's name, as "bench".
        machine: what `vitfast.bench.machine.describe` gives.
        more: what it found, by name.
    """
    return {
        "schema": SCHEMA,
        "kind": f"vitfast {kind}",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv[1:],
        "machine": machine,
        **more,
    }


def bench_document(rows: Iterable[Row], machine: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The `document` of `vitfast bench`, with its rows."""
    return document("bench", machine, **more, rows=[row.as_json() for row in rows])


def check_writable(path: str | os.PathLike[str]) -> Path:
    """A path that can be written later, checked before the long work.

    Raises:
        InputValueError: a directory, no such folder, or a folder without write permission.
    """
    target = Path(path)
    if target.is_dir():
        raise InputValueError(f"{target} is a directory; name a file")
    if not target.absolute().parent.is_dir():
        raise InputValueError(f"{target}: there is no folder {target.absolute().parent}")
    if not os.access(target.absolute().parent, os.W_OK):
        raise InputValueError(f"{target}: the folder {target.absolute().parent} is not writable")
    return target


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file whole or not at all: an interrupt leaves what was there before."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """`write_text` of JSON; NaN and infinities become null, which every reader accepts."""
    write_text(path, json.dumps(_finite(value), indent=1) + "\n")


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A results file written by `vitfast bench`.

    Raises:
        InputValueError: missing, not JSON, or some other file.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputValueError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict) or found.get("kind") != "vitfast bench":
        raise InputValueError(f"{path} was not written by vitfast bench --json")
    if found.get("schema") != SCHEMA:
        raise InputValueError(f"{path} has schema {found.get('schema')}, this is {SCHEMA}")
    return found


@dataclass(frozen=True)
class Change:
    """One ratio before and after: how many times faster than a peer vitfast is in a case.

    Args:
        key: of the case's `Row`.
    """

    key: tuple[str, ...]
    peer: str
    before: float
    after: float

    @property
    def relative(self) -> float:
        """0.1 for a ratio that grew by a tenth."""
        return self.after / self.before - 1

    @property
    def worse(self) -> bool:
        """Whether this is a regression."""
        return self.relative < -WORSE


def changes(before: dict[str, Any], rows: Iterable[Row]) -> list[Change]:
    """How the ratios of these rows differ from an earlier file's, where both have them.

    Ratios, not times: both contenders of a ratio met the same machine on the same day. A model that
    had ratios and is not swapped any more runs as eager, and eager's ratios stand for vitfast's.
    """
    names = ("level", "case", "shape", "dtype", "passes", "device")
    old = {tuple(row.get(n) for n in names): row.get("ratios", {}) for row in before["rows"]}
    return [
        Change(row.key, peer, old[row.key][peer], ratio)
        for row in rows
        if row.key in old
        for peer, ratio in row.ratios("vitfast" if row.swapped else "eager").items()
        if old[row.key].get(peer)
    ]


def _finite(value: Any) -> Any:
    """The value with None for each NaN and infinity in it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
