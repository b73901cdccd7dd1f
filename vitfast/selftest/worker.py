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
from dataclasses import asdict
from typing import IO, Any


def main() -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # before anything is loaded that might print
    return serve(sys.stdin, answers)


def serve(tasks: IO[str], answers: IO[str]) -> int:
    """Answer every task until there are no more; the first answer says that all is loaded."""
    import torch

    from vitfast.selftest.judge import judge
    from vitfast.selftest.problems import Problem
    from vitfast.selftest.timing import measure

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    say({"ready": True})
    for line in tasks:
        task = json.loads(line)
        device = torch.device(task["device"])
        do = judge if task["do"] == "judge" else measure
        found = do(Problem.from_json(task["problem"]), task["passes"], device)
        if device.type == "cuda":
            try:
                torch.cuda.synchronize(device)  # what a kernel broke shows here at the latest
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                say({"state": "failed", "reason": reason, "broken": True})
                return 1
        say(asdict(found))
        if found.broken:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
