"""Interleaved medians: contenders A, B, C are timed A B C A B C ..., never A A A B B B.

A machine's clock, its neighbours and its caches drift over seconds; contenders that take turns
drift together, so that the ratio of their medians stays meaningful when the medians do not.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vitfast.errors import InputValueError

MIN_SAMPLE_SECONDS = 2e-4
"""Shorter calls are repeated within one sample: the clock itself costs some 100 ns."""

SETTLING_SECONDS = 0.05
"""Calls under 50 ms run once more, untimed: the first depends on what ran before it."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one contender, one entry a round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The 25th and 75th percentile."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    @property
    def iqr(self) -> float:
        """Interquartile range: the 75th percentile less the 25th."""
        low, high = self.quartiles
        return high - low


Stopwatch = Callable[[Callable[[], Any], int], tuple[float, Any]]
"""(call, number) -> seconds for so many calls, and what the last of them gave."""


class WallStopwatch:
    """Times calls by the wall clock; `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def __call__(self, call: Callable[[], Any], number: int) -> tuple[float, Any]:
        start = self.clock()
        for _ in range(number):
            output = call()
        return self.clock() - start, output


class CudaStopwatch:
    """Times calls on the current CUDA stream, between two events."""

    def __call__(self, call: Callable[[], Any], number: int) -> tuple[float, Any]:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(number):
            output = call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3, output


def stopwatch(device: str) -> Stopwatch:
    """The stopwatch for work on "cpu" or "cuda"."""
    return CudaStopwatch() if device.startswith("cuda") else WallStopwatch()


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 2.0,
    min_rounds: int = 3,
    max_rounds: int = 500,
    ran_before: Mapping[str, float] | None = None,
    settle: bool = False,
    watch: Stopwatch | None = None,
    check: Callable[[str, Any], object] | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> dict[str, Timing]:
    """Time contenders in turns.

    Args:
        calls: name -> call without arguments.
        seconds: budget of timed work for all contenders together; `min_rounds` may exceed it.
        ran_before: contenders that the caller has run already, and the seconds that it took; they
            are not warmed up again.
        settle: begin a turn of short calls with one that is not timed: another contender's weights
            are in the caches, and its threads may still be waiting for work, busily.
        watch: the wall clock by default.
        check: (name, output) -> anything; it raises or takes note of what is wrong. It is called on
            every contender's first output, before the timing, and on its last one, since a kernel
            may be right ten times and then wrong, and a fast wrong answer is no result.
        on_progress: called with the share of the work that is done, 0 to 1.

    Returns:
        name -> Timing, in the order of `calls`.

    Raises:
        InputValueError: no contenders, or a budget that is not positive.
    """
    if not calls:
        raise InputValueError("interleave: nothing to time")
    if not (seconds > 0 and math.isfinite(seconds) and 1 <= min_rounds <= max_rounds):
        raise InputValueError(
            f"interleave: seconds={seconds}, min_rounds={min_rounds}, max_rounds={max_rounds}"
        )
    watch = watch or WallStopwatch()
    check = check or (lambda name, output: None)
    numbers, times = {}, {}
    for name, call in calls.items():
        once = (ran_before or {}).get(name)
        if once is None:
            once, output = watch(call, 1)  # compiles, packs weights, pages memory in
            check(name, output)
            if once < SETTLING_SECONDS:
                once, output = watch(call, 1)
        times[name] = once
        numbers[name] = max(1, math.ceil(MIN_SAMPLE_SECONDS / max(once, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    last: dict[str, Any] = {}
    spent, rounds = 0.0, 0
    while rounds < min_rounds or (spent < seconds and rounds < max_rounds):
        for name, call in calls.items():
            last.pop(name, None)  # or two outputs would be in memory
            if settle and len(calls) > 1 and times[name] < SETTLING_SECONDS:
                call()
            elapsed, last[name] = watch(call, numbers[name])
            times[name] = elapsed / numbers[name]
            samples[name].append(times[name])
            spent += elapsed
        rounds += 1
        if on_progress is not None:
            on_progress(min(1.0, rounds / min_rounds, max(spent / seconds, rounds / max_rounds)))
    for name, output in last.items():
        check(name, output)
    return {name: Timing(tuple(values)) for name, values in samples.items()}
