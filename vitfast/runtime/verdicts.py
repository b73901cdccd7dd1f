"""Verdicts on GPU kernels, and where they are kept: right, wrong, failed or slow on one machine.

A verdict is of an op's own kernels in one dtype and pass. It holds for one machine (architecture,
device, driver, CUDA or HIP, Triton, torch and vitfast, see `machine_of`) and for one text of the
kernels (`kernels_of`): change one of them and there is no verdict any more.

The package's own verdicts lie in `vitfast/runtime/launch_tables/<architecture>.json`; this user's,
which a self-test makes (`vitfast.prepare`), in a file a machine in `trust` of the user's cache
folder. That folder may be on a shared disk: files are replaced whole, under a lock.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vitfast import __version__
from vitfast.runtime.files import whole_file
from vitfast.runtime.launches import arch_of, packaged
from vitfast.settings import cache_folder, logger

PASSES = ("forward", "backward")
RIGHT, WRONG, FAILED, SLOW = "right", "wrong", "failed", "slow"
"""States of a verdict. FAILED: did not compile, crashed, hung; SLOW: right, and not worth it."""

_PACKAGE = Path(__file__).parents[1]


class Question(NamedTuple):
    """What a verdict is about.

    Args:
        op: a name of `vitfast.ops`.
        dtype: the working dtype, such as "bfloat16".
        passes: "forward" or "backward".
    """

    op: str
    dtype: str
    passes: str


@dataclass(frozen=True)
class Verdict:
    """What a test found.

    Args:
        state: `RIGHT`, `WRONG`, `FAILED` or `SLOW`; only of `RIGHT` kernels are any picked.
        reason: why, for all states but `RIGHT`.
        problems: names of the problems that were tested, for a model may pose others.
        speed: time of what runs otherwise over that of the kernels; None where none was measured.
    """

    state: str
    reason: str = ""
    problems: tuple[str, ...] = ()
    speed: float | None = None


Verdicts = dict[Question, Verdict]


@functools.cache
def machine_of(device: torch.device) -> dict[str, str]:
    """What verdicts on a device hold for: versions and names. A CPU is Triton's interpreter."""
    facts = {
        "arch": arch_of(device).name, "triton": _version("triton"), "torch": str(torch.__version__),
        "vitfast": __version__,
    }  # fmt: skip
    if device.type != "cuda":
        numpy = _version("numpy")
        return {**facts, "device": "Triton's interpreter", "driver": "", "runtime": numpy}
    return {
        **facts,
        "device": torch.cuda.get_device_properties(device).name,
        "driver": _driver(),
        "runtime": str(torch.version.hip or torch.version.cuda),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    """The GPU driver's version, as exactly as the system gives it."""
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            return Path(path).read_text().splitlines()[0].strip()
    return str(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]


_IMPORT = re.compile(r"vitfast\.ops\.(\w+)(?:\.(\w+)| import ([\w, ]+))?")


@functools.cache
def kernels_of(op: str) -> str:
    """A hash of all sources that an op's Triton kernels and their launches are made of.

    It covers more than Triton's own `cache_key`, which knows nothing of the code that launches.
    """
    found = hashlib.sha256()
    for path in sorted(_sources(op)):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _sources(op: str) -> set[Path]:
    """An op's Triton files, and what they import of `vitfast.ops`; of an op that is made of other
    ops, theirs."""
    folder = _PACKAGE / "ops"
    todo = sorted((folder / op).glob("*triton*.py")) or [folder / op / "api.py"]
    found: set[Path] = {_PACKAGE / "runtime" / "triton.py"}
    while todo:
        path = todo.pop()
        if path in found or not path.exists():
            continue
        found.add(path)
        for package, module, names in _IMPORT.findall(path.read_text()):
            modules = [module] if module else [name.strip() for name in names.split(",")]
            todo += [folder / package / f"{name}.py" for name in modules]
            if package not in ("common", op):
                todo += (folder / package).glob("*triton*.py")
    return found


def known(device: torch.device) -> Verdicts:
    """The verdicts that hold for a device as it is now: the package's, and this user's.

    Where both know a question the worse counts.
    """
    machine = machine_of(device)
    carried = packaged(machine["arch"]).get("verdicts", {})
    made_with = carried.get("machine", {})
    found: Verdicts = {}
    if made_with.get("triton") == machine["triton"]:
        found = _decoded(carried.get("ops", {}))
    for question, verdict in _decoded(_read(path_of(device)).get("ops", {})).items():
        if question not in found or found[question].state == RIGHT:
            found[question] = verdict
    return found


def keep(device: torch.device, verdicts: Mapping[Question, Verdict]) -> None:
    """Add verdicts to this user's; a folder that cannot be written is said once, and no error."""
    path = path_of(device)
    try:
        with locked(path):
            ops = {**_decoded(_read(path).get("ops", {})), **verdicts}
            document = as_document(device, ops)
            with whole_file(path) as temporary:
                temporary.write_text(json.dumps(document, indent=1) + "\n")
    except OSError as error:
        _say_once(
            f"verdicts on GPU kernels cannot be kept, and hold for this process only: {error}"
        )


def path_of(device: torch.device) -> Path:
    """This user's file of verdicts on a device; it need not exist."""
    machine = machine_of(device)
    key = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / "trust" / f"{machine['arch']}-{key}.json"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within, no other process of this user has a lock on the same path.

    Makes the folder. Where the system has no `flock` nothing is locked: two processes may then do
    the same work, and the later one's file stays.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as file:
        try:
            import fcntl
        except ImportError:
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back


def _read(path: Path) -> dict[str, Any]:
    """The document in a file; {} where there is none, or none that can be read."""
    try:
        found = json.loads(path.read_text())
        _decoded(found["ops"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _say_once(f"{path} is left out, since it cannot be read: {error!r}")
        return {}
    return found


@functools.cache
def _say_once(text: str) -> None:
    logger.warning("%s", text)


def _encoded(verdicts: Mapping[Question, Verdict]) -> dict[str, dict[str, Any]]:
    """As the files keep them: by op, with the hash of its kernels, then "<dtype> <pass>"."""
    found: dict[str, dict[str, Any]] = {}
    for (op, dtype, passes), verdict in sorted(verdicts.items()):
        entry = found.setdefault(op, {"kernels": kernels_of(op)})
        entry[f"{dtype} {passes}"] = asdict(verdict)
    return found


def _decoded(ops: Mapping[str, Mapping[str, Any]]) -> Verdicts:
    """The verdicts of a file that are of today's kernels."""
    found: Verdicts = {}
    for op, entry in ops.items():
        if entry["kernels"] != kernels_of(op):
            continue
        for name, verdict in entry.items():
            if name != "kernels":
                dtype, passes = name.split(" ")
                state, problems = str(verdict["state"]), tuple(verdict["problems"])
                found[Question(op, dtype, passes)] = Verdict(
                    state, str(verdict["reason"]), problems, verdict["speed"]
                )
    return found


def as_document(device: torch.device, verdicts: Mapping[Question, Verdict]) -> dict[str, Any]:
    """Verdicts as a launch table of the package carries them, under "verdicts"."""
    return {"machine": dict(machine_of(device)), "ops": _encoded(verdicts)}
