"""A session of tests: what is not known of a device's kernels is found out, kept and decided.

Only one process of a user tests on a machine at a time; others wait, and find the verdicts made.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vitfast.ops import spec_of
from vitfast.runtime import native, triton, trust, verdicts
from vitfast.runtime.launches import arch_of, table, write_table
from vitfast.runtime.verdicts import FAILED, RIGHT, SLOW, WRONG, Question, Verdict, Verdicts
from vitfast.selftest import workers
from vitfast.selftest.judge import NO_MEMORY, REFUSED
from vitfast.selftest.problems import Problem, most_flops, samples
from vitfast.settings import logger, settings

MOST_WORKERS = 4
"""Processes that test at a time: compiling takes longer than running, and each holds a context."""
TASK_SECONDS = 120.0
"""The longest that one problem may take, compiling included, before its kernels count as hung."""
MOST_BYTES = 2.0**28
"""Tensors of one recorded call that is tested; a larger one's kernels have the samples only."""
_SLOWER = 1.02
"""Kernels that take this much longer than what runs otherwise are not worth it."""


@dataclass(frozen=True)
class TrustEntry:
    """One line of a report: a question, its verdict, and whether it was made just now."""

    question: Question
    state: str
    reason: str = ""
    speed: float | None = None
    now: bool = False


@dataclass
class TrustReport:
    """What `prepare` found. Prints as a table; true where every kernel that was asked for is used.

    `note`: why nothing was tested; "" where something was, or all was known.
    """

    device: str
    tested: list[TrustEntry] = field(default_factory=list)
    note: str = ""

    def __bool__(self) -> bool:
        return all(entry.state == RIGHT for entry in self.tested)

    def __str__(self) -> str:
        if not self.tested:
            return f"vitfast: nothing to test on {self.device}" + (self.note and f": {self.note}")
        right = sum(entry.state == RIGHT for entry in self.tested)
        head = f"vitfast: {right} of {len(self.tested)} kinds of kernels are used on {self.device}"
        lines = [f"{head}; {self.note}" if self.note else head]
        for entry in self.tested:
            speed = "" if entry.speed is None else f"  {entry.speed:.2f}x"
            reason = f"  {entry.reason}" if entry.reason else ""
            lines.append(f"  {' '.join(entry.question):<44}{entry.state}{speed}{reason}")
        return "\n".join(lines)


def is_testable(device: torch.device) -> bool:
    """Whether kernels on this device need a test and can have one: a GPU; in Triton's interpreter
    without a C++ extension, the CPU."""
    if device.type == "cpu" and not (native.reasons() and trust.interprets()):
        return False
    return device.type in ("cpu", "cuda") and not triton.available()


def decide(
    device: torch.device, wanted: Mapping[Question, Sequence[Problem]], progress: bool | None
) -> TrustReport:
    """Answer questions: from what is known, and by testing what is not; decide by the answers.

    Args:
        wanted: recorded problems by question, which an answer has to hold for besides the samples.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    why = _not_now(device)
    if why:
        return TrustReport(str(device), note=why)
    report = TrustReport(verdicts.machine_of(device)["device"])
    with contextlib.ExitStack() as stack:
        known = verdicts.known(device)
        if settings.trust == "test" and _open(device, known, wanted):
            with contextlib.suppress(OSError):  # a folder that cannot be written
                stack.enter_context(verdicts.locked(_turn(device)))
                known = verdicts.known(device)  # another process may have had its turn before
        todo = _open(device, known, wanted) if settings.trust == "test" else {}
        now = {}
        if todo:
            now = _tested(device, known, todo, progress)
            verdicts.keep(device, now)
    found = {**known, **now}
    trust.adopt(device, {q: found[q] for q in wanted if q in found})
    for question in wanted:
        verdict = found.get(question)
        if verdict is None:
            report.tested.append(TrustEntry(question, "not tested"))
            continue
        report.tested.append(
            TrustEntry(question, verdict.state, verdict.reason, verdict.speed, question in now)
        )
    return report


def _not_now(device: torch.device) -> str:
    """Why nothing is to be tested or compiled; "" if nothing is in the way."""
    if not is_testable(device):
        if device.type == "cpu":
            return "the CPU's kernels are trusted by vitfast's own tests"
        return "; ".join(triton.available()) or f"there are no kernels for {device.type}"
    if settings.trust == "never":
        return "settings.trust is 'never'"
    if torch.compiler.is_compiling():
        return "torch.compile is tracing"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return ""


def _turn(device: torch.device) -> Path:
    path = verdicts.path_of(device)
    return path.with_name(f"{path.stem}-test")


def _open(
    device: torch.device, known: Verdicts, wanted: Mapping[Question, Sequence[Problem]]
) -> dict[Question, list[Problem]]:
    """The problems that no verdict covers. What is wrong or failed once is not tried again."""
    todo: dict[Question, list[Problem]] = {}
    for question, recorded in wanted.items():
        verdict = known.get(question)
        if verdict is not None and verdict.state in (WRONG, FAILED):
            continue
        covered = set(verdict.problems) if verdict else set()
        spec = spec_of(question.op)
        problems = [*samples(spec, question.dtype, most_flops(device)), *recorded]
        left = [p for p in problems if p.name not in covered and p.bytes <= MOST_BYTES]
        if left:
            todo[question] = left
    return todo


def _tested(
    device: torch.device, known: Verdicts, todo: Mapping[Question, Sequence[Problem]],
    progress: bool | None,
) -> Verdicts:  # fmt: skip
    """Verdicts on the kernels that these problems run, told of as they come in."""
    tasks = [(q, problem) for q, problems in todo.items() for problem in problems]
    show = _Progress(len(tasks), verdicts.machine_of(device)["device"], progress)
    replies: dict[Question, list[tuple[Problem, dict[str, Any]]]] = {q: [] for q in todo}
    count = max(1, min(MOST_WORKERS, os.cpu_count() or 1))
    jobs = [
        {"do": "judge", "problem": p.to_json(), "passes": q.passes, "device": str(device)}
        for q, p in tasks
    ]
    for number, reply in workers.answers(jobs, count, TASK_SECONDS, environment=ENVIRONMENT):
        question, problem = tasks[number]
        replies[question].append((problem, reply))
        show.step()
    unasked = [r for found in replies.values() for _, r in found if not r.get("asked", True)]
    if unasked:
        logger.warning("kernels could not be tested on %s: %s", device, unasked[0]["reason"])
    found = {}
    for question, answers in replies.items():
        before = known[question].problems if question in known else ()
        verdict = verdict_of(answers, before)
        if verdict is not None:
            found[question] = verdict
    if device.type == "cuda":
        found = _timed(device, found, todo)
    show.end()
    for question, verdict in found.items():
        level = logger.info if verdict.state in (RIGHT, SLOW) else logger.warning
        level("%s on %s: %s %s", " ".join(question), device, verdict.state, verdict.reason)
    return found


ENVIRONMENT = {
    "VITFAST_TRUST": "never", "VITFAST_BACKEND": "", "VITFAST_DISABLE": "", "VITFAST_LOG": "",
}  # fmt: skip
"""Settings of a worker: whatever this user's are, it runs the backend that it is told."""


def verdict_of(
    answers: Sequence[tuple[Problem, Mapping[str, Any]]], before: Sequence[str]
) -> Verdict | None:
    """Of all problems of a question; None where it stays open, for want of memory or of a worker
    that starts."""
    if not all(answer.get("asked", True) for _, answer in answers):
        return None  # which says nothing about the kernels
    for state in (WRONG, FAILED):
        for problem, answer in answers:
            if answer["state"] == state:
                return Verdict(state, f"{problem.name}: {answer['reason']}")
    if any(answer["state"] == NO_MEMORY for _, answer in answers):
        return None
    right = [problem.name for problem, answer in answers if answer["state"] == RIGHT]
    refused = [problem.name for problem, answer in answers if answer["state"] == REFUSED]
    if not right and not before:
        reason = answers[0][1]["reason"] if answers else "it has no problems"
        return Verdict(FAILED, f"it refuses all problems: {reason}")
    return Verdict(RIGHT, problems=(*before, *right, *refused))


def _timed(
    device: torch.device, found: Verdicts, todo: Mapping[Question, Sequence[Problem]]
) -> Verdicts:
    """The right ones beside what runs otherwise, one after another, at the model's own sizes, of
    which a recorded problem is one, or at those of the samples that are of real models."""
    tasks = []
    for question, verdict in found.items():
        if verdict.state == RIGHT:
            spec = spec_of(question.op)
            real = {s.name for s in spec.samples if "real" in s.tags}
            recorded = [p for p in todo[question] if not p.sample]
            chosen = recorded or [p for p in todo[question] if p.sample in real]
            tasks += [(question, problem) for problem in chosen]
    jobs = [
        {"do": "time", "problem": p.to_json(), "passes": q.passes, "device": str(device)}
        for q, p in tasks
    ]
    times: dict[Question, list[dict[str, Any]]] = {}
    for number, reply in workers.answers(jobs, 1, TASK_SECONDS, environment=ENVIRONMENT):
        if reply.get("seconds"):
            times.setdefault(tasks[number][0], []).append(reply)
    return {**found, **with_times(device, found, times)}


def with_times(
    device: torch.device, found: Verdicts, times: Mapping[Question, Sequence[Mapping[str, Any]]]
) -> Verdicts:
    """The right verdicts of those that were timed, with their speed; what was fastest at which size
    goes into this user's launch table.

    Args:
        times: by question what workers answered, as `timing.Times`.
    """
    timed = {
        question: judged_by_time(found[question], replies)
        for question, replies in times.items()
        if question in found and found[question].state in (RIGHT, SLOW)
    }
    entries: dict[str, list[dict[str, Any]]] = {}
    for question in timed:
        for reply in times[question]:
            for what, key in reply["asked"]:
                best = min(reply["seconds"], key=reply["seconds"].get).split(" ")[0]
                entries.setdefault(what, []).append({"key": key, "choice": best})
    _keep_choices(device, entries)
    return timed


def judged_by_time(verdict: Verdict, replies: Sequence[Mapping[str, Any]]) -> Verdict:
    """A right op's verdict with its speed; SLOW where its kernels lose and nothing chooses by size.

    Args:
        replies: of each problem {"seconds": {backend: s}, "asked": [what the table is asked]}.
    """
    ours = sum(r["seconds"]["triton"] for r in replies)
    others = sum(min(s for n, s in r["seconds"].items() if n != "triton") for r in replies)
    speed = others / ours
    if speed * _SLOWER >= 1 or any(r["asked"] for r in replies):
        return Verdict(RIGHT, problems=verdict.problems, speed=speed)
    reason = f"torch's own take {speed:.2f} of their time"
    return Verdict(SLOW, reason, verdict.problems, speed)


def _keep_choices(device: torch.device, entries: Mapping[str, list[dict[str, Any]]]) -> None:
    """Add what was fastest to this user's launch table."""
    if not entries:
        return
    arch = arch_of(device)
    kernels = table(arch.name)["kernels"]
    merged = {}
    for what, new in entries.items():
        keys = [entry["key"] for entry in new]
        merged[what] = [e for e in kernels.get(what, []) if e["key"] not in keys] + new
    try:
        write_table(arch, merged)
    except OSError as error:
        logger.warning("which kernels are fastest cannot be kept: %s", error)


class _Progress:
    """A line on the error output that is written over as tests are done."""

    def __init__(self, count: int, device: str, wanted: bool | None) -> None:
        self.shown = sys.stderr.isatty() if wanted is None else wanted
        self.count, self.done, self.device = count, 0, device
        self._show()

    def step(self) -> None:
        self.done += 1
        self._show()

    def _show(self) -> None:
        if self.shown:
            text = f"vitfast: testing kernels on {self.device}, once on this machine: "
            print(f"\r{text}{self.done} of {self.count}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.shown:
            print(file=sys.stderr)
