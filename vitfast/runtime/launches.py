"""Launch configs of GPU kernels as data: no timing at run time, and the same pick on every rank.

A config comes from the device's table where it has an entry for the kernel: the exact shape, else
the nearest one; and from the kernel's heuristic where there is no table.

A table is a JSON file, `<architecture>.json`: the package's own in `vitfast/runtime/launch_tables`,
which carries verdicts on the kernels too (see `verdicts`), and this user's in `launches` of the
user's cache folder, which `vitfast tune` and `vitfast.prepare` write. The user's counts for as long
as what it was measured with is installed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitfast import __version__
from vitfast.runtime.files import whole_file
from vitfast.settings import cache_folder, logger

LAUNCHES = Path(__file__).parent / "launch_tables"
_KERNELS = Path(__file__).parents[1] / "ops"
_SHARED = {
    "sm_75": 65_536, "sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90": 232_448,
    "sm_100": 232_448, "sm_120": 101_376, "gfx950": 163_840,
}  # fmt: skip
TARGETS = (
    "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120",
    "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201",
)  # fmt: skip
"""Architectures that every kernel is compiled for ahead of time."""


@dataclass(frozen=True)
class Arch:
    """A GPU architecture as launch heuristics see it: "sm_90", "gfx942" or "interpreter"."""

    name: str

    @property
    def is_amd(self) -> bool:
        return self.name.startswith("gfx")

    @property
    def capability(self) -> int:
        """NVIDIA's compute capability, e.g. 90; 0 elsewhere."""
        return int(self.name[3:]) if self.name.startswith("sm_") else 0

    @property
    def warp_size(self) -> int:
        return 64 if self.name.startswith("gfx9") else 32

    @property
    def shared_bytes(self) -> int:
        """Shared memory that one block may use."""
        return _SHARED.get(self.name, 65_536 if self.is_amd else 101_376)

    @property
    def has_dot(self) -> bool:
        """Whether Triton has matrix instructions for it.

        None below sm_80 since Triton 3.3; none on RDNA 1 and 2, which have no such instructions.
        """
        if self.is_amd:
            return not self.name.startswith("gfx10")
        return self.capability == 0 or self.capability >= 80

    @property
    def has_tf32(self) -> bool:
        """Whether Triton multiplies float32 as TF32 there: sm_80 and newer, and gfx942.

        Any other target of its HIP backend refuses `input_precision="tf32"`.
        """
        return self.name == "gfx942" if self.is_amd else self.has_dot


@dataclass(frozen=True)
class Launch:
    """Constants that a kernel is compiled with, and the options of its launch."""

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2

    def options(self) -> dict[str, Any]:
        """Options of a launch. Triton's own choice of fusing a * b + c differs by version."""
        return {
            "num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True,
        }  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One kernel x config x dtype, for ahead-of-time compilation.

    Args:
        name: unique within the op, such as "forward-d64-fp16".
        kernel: the `triton.jit` function.
        signature: type of each argument that is no constant, such as "*fp16", "i32", "fp32".
        constants: value of each `tl.constexpr` argument; None for a pointer that is absent.
        dots: whether matrix instructions have to be in the result.
        uneven: integer arguments that are no multiples of 16 in the problem this is compiled for.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    launch: Launch
    dots: bool = False
    uneven: frozenset[str] = frozenset()


@functools.cache
def arch_of(device: torch.device) -> Arch:
    """Architecture of the device; a CPU is the interpreter's."""
    if device.type != "cuda":
        return Arch("interpreter")
    if torch.version.hip:
        return Arch(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return Arch(f"sm_{major}{minor}")


_FROM_TABLES: list[Any] = []


def from_tables(function: Callable[..., Any]) -> Any:
    """`functools.cache` of what is found in tables, or depends on that, until one changes."""
    cached = functools.lru_cache(maxsize=4096)(function)
    _FROM_TABLES.append(cached)
    return cached


def reread_tables() -> None:
    """Read the tables again."""
    for cached in _FROM_TABLES:
        cached.cache_clear()
    choose_anew()


_editions = itertools.count(1)
_edition = 0


def choose_anew() -> None:
    """Whatever was recorded with the kernels chosen so far is recorded again."""
    global _edition
    _edition = next(_editions)


def edition() -> int:
    """A number that changes with the tables and with what is trusted: with which kernels run."""
    return _edition


@from_tables
def table(arch: str) -> dict[str, Any]:
    """What is known of a device: {"kernels": {name: [entry, ...]}}.

    An entry is {"key": {...}, "blocks": {...}, "num_warps": n, "num_stages": n}, or
    {"key": {...}, "choice": name} where a vendor's kernels are chosen from.
    """
    path = _users_file(arch)
    if not path.exists():
        return packaged(arch)
    try:
        found = json.loads(path.read_text())
        made_with = found["made_with"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("%s is left out, since it cannot be read: %r", path, error)
        return packaged(arch)
    now = _made_with(arch)
    stale = [name for name, what in now.items() if made_with.get(name) != what]
    if stale:
        logger.warning(
            "%s is left out, since it was measured with another version of: %s; vitfast tune "
            "measures again", path, ", ".join(stale)
        )  # fmt: skip
        return packaged(arch)
    return found


def packaged(arch: str) -> dict[str, Any]:
    """As `table`, of what the package itself brings."""
    path = LAUNCHES / f"{arch}.json"
    return json.loads(path.read_text()) if path.exists() else {"kernels": {}}


def _users_file(arch: str) -> Path:
    return cache_folder() / "launches" / f"{arch}.json"


def _made_with(arch: str) -> dict[str, str | None]:
    """What measurements of kernels hold for; "kernels" stands for their sources and our table."""
    sources = hashlib.sha256()
    for path in [*sorted(_KERNELS.rglob("*triton*.py")), LAUNCHES / f"{arch}.json"]:
        if path.exists():
            sources.update(path.read_bytes())
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "vitfast": __version__,
        "torch": str(torch.__version__),
        "triton": triton,
        "kernels": sources.hexdigest()[:16],
    }


def path_of(arch: Arch) -> Path:
    """The user's file of an architecture's table, in a folder that exists."""
    path = _users_file(arch.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_table(arch: Arch, kernels: dict[str, Any]) -> Path:
    """Add entries of kernels to what this user knows of a device; those of a kernel replace it."""
    known = table(arch.name)
    known = {"made_with": _made_with(arch.name), "kernels": {**known["kernels"], **kernels}}
    path = path_of(arch)
    with whole_file(path) as temporary:  # other processes see all of it, or nothing
        temporary.write_text(json.dumps(known, indent=1) + "\n")
    reread_tables()
    return path


def launch_of(
    kernel: str, arch: Arch, key: Mapping[str, int | str], heuristic: Callable[[Arch, dict], Launch]
) -> Launch:
    """The config of a kernel for a problem.

    Args:
        key: what the best config depends on. Strings (dtypes, kinds) must agree with those of a
            table's entry; of the entries that do, the one with the nearest sizes is taken.
    """
    items = tuple(sorted(key.items()))
    if not _watchers:
        return _launch_of(kernel, arch, items, heuristic)
    return _watchers[-1](kernel, key, _launch_of(kernel, arch, items, heuristic))


_watchers: list[Callable[[str, Mapping[str, int | str], Launch], Launch]] = []


@contextlib.contextmanager
def watching(
    change: Callable[[str, Mapping[str, int | str], Launch], Launch],
) -> Iterator[None]:
    """Within, every pick goes through `change(kernel, key, launch)`: for `vitfast tune`."""
    _watchers.append(change)
    try:
        yield
    finally:
        _watchers.pop()


@from_tables
def _launch_of(
    kernel: str, arch: Arch, items: tuple[tuple[str, int | str], ...],
    heuristic: Callable[[Arch, dict], Launch],
) -> Launch:  # fmt: skip
    key = dict(items)
    best = _nearest(kernel, arch, key)
    if best is None:
        return heuristic(arch, key)
    return Launch(best["blocks"], best["num_warps"], best["num_stages"])


def choice_of(what: str, arch: Arch, key: Mapping[str, int | str]) -> str:
    """What a device's table names as the fastest choice for a problem; "" without a table.

    `what` is "attention.vendor" (which vendor kernel) or "<op>.backend" (Triton's or a vendor's).
    """
    for asked in _askers:
        asked.append((what, dict(key)))
    return _choice_of(what, arch, tuple(sorted(key.items())))


_askers: list[list[tuple[str, dict[str, int | str]]]] = []


@contextlib.contextmanager
def asking() -> Iterator[list[tuple[str, dict[str, int | str]]]]:
    """Gives what `choice_of` is asked for within: for `vitfast tune`."""
    found: list[tuple[str, dict[str, int | str]]] = []
    _askers.append(found)
    try:
        yield found
    finally:
        _askers.remove(found)


def is_watched() -> bool:
    """Whether somebody is `watching` picks or `asking` for what they depend on."""
    return bool(_watchers or _askers)


@from_tables
def _choice_of(what: str, arch: Arch, items: tuple[tuple[str, int | str], ...]) -> str:
    best = _nearest(what, arch, dict(items))
    return "" if best is None else best["choice"]


def _nearest(kernel: str, arch: Arch, key: Mapping[str, int | str]) -> dict[str, Any] | None:
    entries = table(arch.name)["kernels"].get(kernel, [])
    ranked = [(distance(key, e["key"]), i) for i, e in enumerate(entries)]
    ranked = [r for r in ranked if r[0] < math.inf]
    return entries[min(ranked)[1]] if ranked else None


_COUNTS = frozenset(("m", "tokens", "pixels"))
"""Sizes that only say how much there is to do: a config for any other serves, the nearest best. All
others (head dims, channels, tokens of a window) decide what a block holds in registers and shared
memory: a config for head dim 64 wants more than there is at 256."""


def distance(key: Mapping[str, int | str], other: Mapping[str, int | str]) -> float:
    """Of sizes, in powers of two; infinite where a name, a kind or a flag (0 or 1) differs, or a
    width by more than a factor of two."""
    if key.keys() != other.keys():
        return math.inf
    total = 0.0
    for name, value in key.items():
        known = other[name]
        if value == known:
            continue
        if isinstance(value, str) or isinstance(known, str) or min(value, known) <= 0:
            return math.inf
        apart = abs(math.log2(value) - math.log2(known))
        if name not in _COUNTS and apart > 1:
            return math.inf
        total += apart
    return total
