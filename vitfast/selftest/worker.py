"""A worker: judges the problems that it reads, a line of JSON each, and answers with a line each.

    python -m vitfast.selftest.worker

A task is {"do": "judge" or "time", "problem": ..., "passes": ..., "device": ...}; the answer has
the fields of `judge.Answer` or `timing.Times`. What kernels or libraries print goes to the standard
error output.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import IO, Any

import torch

from vitfast.errors import first_line
from vitfast.runtime.verdicts import FAILED
from vitfast.selftest.judge import judge
from vitfast.selftest.problems import Problem
from vitfast.selftest.timing import measure

Handler = Callable[[dict[str, Any], torch.device], dict[str, Any]]
"""(task, its device) -> the answer."""


def main(more: Mapping[str, Handler] | None = None) -> int:
    """Serve the standard input; `more` are handlers by what tasks say to do."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # before a kernel or library prints
    return serve(sys.stdin, answers, {**HANDLERS, **(more or {})})


def serve(tasks: IO[str], answers: IO[str], handlers: Mapping[str, Handler]) -> int:
    """Answer every task until there are no more; the first answer says that all is loaded."""

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    say({"ready": True})
    for line in tasks:
        task = json.loads(line)
        device = torch.device(task["device"])
        found = handlers[task["do"]](task, device)
        if device.type == "cuda":
            try:
                torch.cuda.synchronize(device)  # what a kernel broke shows here at the latest
            except RuntimeError as error:
                found = {"state": FAILED, "reason": first_line(error), "broken": True}
        say(found)
        if found.get("broken"):
            return 1
    return 0


def _judge(task: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return asdict(judge(Problem.from_json(task["problem"]), task["passes"], device))


def _time(task: dict[str, Any], device: torch.device) -> dict[str, Any]:
    by_vendor = task.get("by_vendor", False)
    problem = Problem.from_json(task["problem"])
    return asdict(measure(problem, task["passes"], device, by_vendor=by_vendor))


HANDLERS: dict[str, Handler] = {"judge": _judge, "time": _time}


if __name__ == "__main__":
    sys.exit(main())
