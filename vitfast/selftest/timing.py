"""Timing one problem: an op's Triton kernels beside what runs in their place, with cold caches."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vitfast.errors import first_line
from vitfast.ops import spec_of
from vitfast.ops.attention import vendor
from vitfast.runtime import trust
from vitfast.runtime.launches import asking
from vitfast.runtime.verdicts import RIGHT, Question, Verdict
from vitfast.selftest.judge import make_case
from vitfast.selftest.problems import Problem

WARM, TIMED = 3, 15
"""Calls before, and in, the measurement, each of every backend in turn."""

Clock = Callable[[Callable[[], Any]], float]
"""(call) -> seconds of one call."""


@dataclass(frozen=True)
class Times:
    """What was measured.

    Args:
        seconds: median by backend; empty where one of them failed.
        asked: [what, key] of every entry of a launch table that chooses among these backends.
        reason: what failed.
        broken: whether the process can do nothing more on the device.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    asked: list[list[Any]] = field(default_factory=list)
    reason: str = ""
    broken: bool = False


def measure(
    problem: Problem, passes: str, device: torch.device, clock: Clock | None = None,
    by_vendor: bool = False,
) -> Times:  # fmt: skip
    """Medians of Triton's kernels and of every backend that could stand in for them.

    Args:
        passes: "forward" without gradients, or "backward", which is both passes of training.
        clock: that of the GPU, after everything was put out of its second-level cache.
        by_vendor: whether each of a vendor's attention kernels is timed by itself, too.
    """
    try:
        return _measured(problem, passes, device, clock or clock_of(device), by_vendor)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        return Times(reason=reason, broken=device.type == "cuda")


def _measured(
    problem: Problem, passes: str, device: torch.device, clock: Clock, by_vendor: bool
) -> Times:
    spec = spec_of(problem.op)
    case = make_case(problem, device)

    def run(backend: str) -> Any:
        if passes == "backward":
            return case.call.gradients(
                case.spec.public, case.output_grads, names=case.trained, backend=backend
            )
        with torch.no_grad():
            return case.call.run(case.spec.public, backend=backend)

    question = Question(problem.op, problem.dtype, passes)
    trust.adopt(device, {question._replace(passes=p): Verdict(RIGHT) for p in ("forward", passes)})
    with asking() as asked:
        run("auto")
    calls: dict[str, Callable[[], Any]] = {
        name: functools.partial(run, name)
        for name in ("triton", "vendor", "reference")
        if name in spec.dispatcher.backends
    }
    if "vendor" in calls:  # which is what the reference would be replaced by
        del calls["reference"]
    if by_vendor and problem.op == "attention":
        calls |= _vendors_own(calls["vendor"])
    for _ in range(WARM):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TIMED):
        for name, call in calls.items():
            times[name].append(clock(call))
    keys = [[what, key] for what, key in asked if what == f"{problem.op}.backend"]
    return Times({name: statistics.median(found) for name, found in times.items()}, keys)


def _vendors_own(call: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """The call on each of a vendor's kernels that takes it: "vendor flash", ..."""

    def forced(name: str) -> Any:
        with vendor.forcing(name):
            return call()

    found: dict[str, Callable[[], Any]] = {}
    for name in vendor.UNMASKED:
        with contextlib.suppress(Exception):  # not installed, or not for this head dim or card
            forced(name)
            found[f"vendor {name}"] = functools.partial(forced, name)
    return found


def clock_of(device: torch.device) -> Clock:
    """Seconds of one call on a GPU, between events, with a cold second-level cache; by the wall
    clock elsewhere."""
    if device.type != "cuda":
        return _wall_clock
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    cold = torch.empty(max(2 * cache, 1 << 24), dtype=torch.uint8, device=device)

    def clock(call: Callable[[], Any]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cold.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return clock


def _wall_clock(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
