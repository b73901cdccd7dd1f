"""Peak memory of one contender in a process of its own, where nobody else's pages count.

The child searches for modules where its parent does, and prints one line of JSON.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

import torch

import vitfast.swap  # noqa: F401 so that what it takes counts before the first look at memory
from vitfast.bench import memory, modules, peers
from vitfast.bench.progress import Progress
from vitfast.bench.record import Row
from vitfast.errors import VitfastError
from vitfast.selftest.workers import command_of

CALLS = 2
"""The first call packs weights; the second has the peak of those that follow."""


UNTOLD = "this system does not tell the peak of a process"
"""Why there is no number where a child ran and gave None."""


class ChildError(VitfastError, RuntimeError):
    """The child gave no number; the message is its last line."""


def peak_in_child(arguments: dict[str, Any], timeout: float = 600.0) -> float | None:
    """Run one contender in a process of its own.

    Args:
        arguments: model, img_size, batch, dtype, device, train, threads, contender.
        timeout: seconds.

    Returns:
        MB at the peak of inference or training, weights included, beyond what the process takes
        before it has a model; None where this system cannot tell.

    Raises:
        ChildError: the child failed or took too long.
    """
    return answer("vitfast.bench.child", arguments, timeout)["peak_mb"]


def answer(module: str, arguments: dict[str, Any], timeout: float) -> dict[str, Any]:
    """The JSON that `python -m <module>` prints last, given its arguments as JSON.

    Args:
        timeout: seconds.

    Raises:
        ChildError: the child failed or took too long.
    """
    command = [*command_of(module), json.dumps(arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise ChildError(f"no answer in {timeout:.0f} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ChildError(lines[-1])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """What the child runs; its argument is those of `measure`, as JSON."""
    print(json.dumps({"peak_mb": measure(json.loads(sys.argv[1]))}))
    return 0


def measure(arguments: dict[str, Any]) -> float | None:
    """As `peak_in_child`, in this process: what the child runs.

    Imports come before the first look at memory, so they do not count.
    """
    torch.set_num_threads(arguments["threads"])
    device, contender = arguments["device"], arguments["contender"]
    if contender in ("onnxruntime", "openvino") and importlib.util.find_spec(contender):
        importlib.import_module(contender)
    setting = peers.Setting(getattr(torch, arguments["dtype"]), device, arguments["train"])
    memory.reset_peak(device)
    before = memory.in_use_mb(device)
    case = modules.model_case(
        arguments["model"], arguments["img_size"], arguments["batch"], setting
    )
    call = peers.FACTORIES[contender](case.module, case.inputs, setting)
    del case  # converted models keep what they need of it
    if not memory.reset_peak(device) or before is None:
        return None
    for _ in range(CALLS):
        call()
    peak = memory.peak_mb(device)
    return None if peak is None else peak - before


def add_model_memory(row: Row, case_arguments: dict[str, Any], progress: Progress) -> None:
    """Fill in `peak_mb` of every contender of a model's row, each from a process of its own.

    Args:
        case_arguments: those of `peak_in_child` but the contender. A child that fails leaves a note
            in the row.
    """
    measured = [name for name, result in row.results.items() if result.median_ms is not None]
    for i, name in enumerate(measured):
        progress(f"memory of {name}", i / len(measured))
        try:
            row.results[name].peak_mb = peak_in_child({**case_arguments, "contender": name})
        except ChildError as error:
            row.note = "; ".join(filter(None, [row.note, f"memory of {name}: {error}"]))
