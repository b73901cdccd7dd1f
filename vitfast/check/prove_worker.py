"""A worker of `vitfast prove`: the self-test's tasks, checks of the hardware, and whole models."""

from __future__ import annotations

import sys
from typing import Any

import torch

from vitfast.bench import modules
from vitfast.bench.peers import Setting
from vitfast.check.hardware import checks_of
from vitfast.errors import BackendUnavailableError, first_line
from vitfast.ops import spec_of
from vitfast.runtime.verdicts import FAILED, RIGHT, WRONG
from vitfast.selftest import worker
from vitfast.selftest.judge import NO_MEMORY, REFUSED, plain_arithmetic


def main() -> int:
    return worker.main({"check": _check, "model": _model})


def _check(task: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """One check of `vitfast.check.hardware`: {"op", "name"} to {"state", "reason"}."""
    spec = spec_of(task["op"])
    check = checks_of(spec, "triton", str(device.type))[task["name"]]
    try:
        with plain_arithmetic():
            faults = check()
    except BackendUnavailableError as error:
        return {"state": REFUSED, "reason": first_line(error, last=True)}
    except torch.cuda.OutOfMemoryError as error:
        return {"state": NO_MEMORY, "reason": first_line(error)}
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        return {"state": FAILED, "reason": reason, "broken": device.type == "cuda"}
    return {"state": WRONG if faults else RIGHT, "reason": "; ".join(faults[:3])}


def _model(task: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A model beside timm's: {"model", "size", "batch", "dtype", "train", "peers", "seconds",
    "options"} to {"state", "row"}, a row of `vitfast bench`."""
    setting = Setting(getattr(torch, task["dtype"]), str(device), task["train"])
    size = task["size"] and tuple(task["size"])
    try:
        case = modules.model_case(task["model"], size, task["batch"], setting, **task["options"])
        row = modules.measure(case, task["peers"], seconds=task["seconds"])
    except torch.cuda.OutOfMemoryError as error:
        return {"state": NO_MEMORY, "reason": first_line(error)}
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        return {"state": FAILED, "reason": reason, "broken": device.type == "cuda"}
    result = row.results.get("vitfast")
    budget = None if result is None else result.error_over_budget
    wrong = budget is not None and budget > 1
    return {"state": WRONG if wrong else RIGHT, "reason": "", "row": row.as_json()}


if __name__ == "__main__":
    sys.exit(main())
