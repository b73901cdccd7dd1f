"""Finding launch configs by timing, once, for a table that is then committed.

For every kernel that an op launches on a sample, one part of its config is changed at a time (a
tile size halved or doubled, other numbers of warps and stages) while that helps. A config must give
what the reference gives, within the error criterion, and win by more than the noise.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vitfast.bench.timer import Stopwatch, interleave, stopwatch
from vitfast.ops.attention import vendor
from vitfast.ops.spec import OpSpec, Sample
from vitfast.runtime.launches import Launch, asking, watching
from vitfast.testing.cases import Case

GAIN = 1.02
"""A config that is not this much faster than another is no better."""


@dataclass(frozen=True)
class Pick:
    """One launch that a call made: which kernel, what its config depended on, and the config."""

    kernel: str
    key: Mapping[str, int | str]
    launch: Launch

    def entry(self) -> dict[str, Any]:
        """As the launch table of an architecture keeps it."""
        return {
            "key": dict(self.key),
            "blocks": dict(self.launch.blocks),
            "num_warps": self.launch.num_warps,
            "num_stages": self.launch.num_stages,
        }


Entries = dict[str, list[dict[str, Any]]]
"""Part of a launch table: kernel or choice (as "attention.vendor") -> its entries."""


@dataclass(frozen=True)
class Terms:
    """How to search.

    Args:
        seconds: timed work a comparison.
        until: no search begins after this time of `time.monotonic`.
        known: entries that exist; what they have is not searched again.
        watch: the clock; that of the device by default.
        say: gets a line about each finding.
    """

    device: str = "cuda"
    seconds: float = 4.0
    until: float = math.inf
    known: Entries = field(default_factory=dict)
    watch: Stopwatch | None = None
    say: Callable[[str], None] = lambda text: None

    @property
    def clock(self) -> Stopwatch:
        """What measures time."""
        return self.watch or stopwatch(self.device)

    @property
    def over(self) -> bool:
        """Whether the time for searching is spent."""
        return time.monotonic() > self.until

    def has(self, what: str, key: Mapping[str, int | str]) -> bool:
        """Whether the table knows this kernel's (or choice's) entry for a key already."""
        return any(entry["key"] == key for entry in self.known.get(what, []))

    def fastest(self, calls: Mapping[str, Callable[[], Any]], what: str) -> str:
        """The name of the call with the lowest median; `what` they are goes into the line said."""
        times = interleave(calls, seconds=self.seconds, watch=self.clock)
        best = min(times, key=lambda name: times[name].median)
        shown = ", ".join(f"{name} {t.median * 1e6:.0f} us" for name, t in times.items())
        self.say(f"{what}: {best} of {shown}")
        return best


def picks_of(call: Callable[[], Any]) -> list[Pick]:
    """The launches of a call, each kernel and key once."""
    found: dict[Any, Pick] = {}

    def note(kernel: str, key: Mapping[str, int | str], launch: Launch) -> Launch:
        found[kernel, tuple(sorted(key.items()))] = Pick(kernel, dict(key), launch)
        return launch

    with watching(note):
        call()
    return list(found.values())


_SIZES = {
    "LAZY": (0, 1),
    "POLYNOMIAL": (0, 1),
    "GROUP": (4, 8, 16),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3, 4),
}
"""Part of a config -> the values that are tried. Tiles are tried at half and twice their size."""


def neighbours(launch: Launch) -> Iterator[list[Launch]]:
    """Configs that differ from one in a single part, a list a part."""

    def sizes(name: str, now: int) -> tuple[int, ...]:
        if name.startswith(("BLOCK", "ROWS")):
            return tuple(s for s in (now // 2, now * 2) if 1 <= s <= 256)
        return tuple(s for s in _SIZES.get(name, ()) if s != now)

    for name, now in launch.blocks.items():
        yield [replace(launch, blocks={**launch.blocks, name: s}) for s in sizes(name, now)]
    yield [replace(launch, num_warps=s) for s in sizes("num_warps", launch.num_warps)]
    yield [replace(launch, num_stages=s) for s in sizes("num_stages", launch.num_stages)]


def runner(case: Case, train: bool, device: str) -> Callable[..., Any]:
    """(backend="triton") -> the outputs of a case on a device, in training its gradients."""
    call = case.call.map(lambda t: t.to(device))
    grads = [g.to(device) for g in case.output_grads] if train else []

    def run(backend: str = "triton") -> Any:
        if train:
            return call.gradients(case.spec.public, grads, names=case.trained, backend=backend)
        with torch.no_grad():
            return call.run(case.spec.public, backend=backend)

    return run


def tune(spec: OpSpec, sample: Sample, dtype: torch.dtype, train: bool, terms: Terms) -> Entries:
    """Search launch configs for the Triton kernels that one op launches on one sample."""
    case = Case(spec, sample, dtype)
    run = runner(case, train, terms.device)
    found: Entries = {}
    for pick in picks_of(run):
        if terms.has(pick.kernel, pick.key):
            continue
        if terms.over:
            terms.say(f"{pick.kernel} {dict(pick.key)}: left out, out of time")
            continue
        best = _best(pick, run, case, train, terms)
        found.setdefault(pick.kernel, []).append(best.entry())
    return found


def searches(spec: OpSpec) -> list[Callable[[OpSpec, Sample, torch.dtype, bool, Terms], Entries]]:
    """The searches for one op, in order: choices come last, when what they choose from is tuned."""
    has_triton = "triton" in spec.dispatcher.backends
    return [
        *([tune] if has_triton else []),
        *([tune_vendor] if spec.name == "attention" else []),
        *([tune_backend] if has_triton else []),
    ]


def _best(pick: Pick, run: Callable[[], Any], case: Case, train: bool, terms: Terms) -> Pick:
    """The fastest right config on the way from a pick, one part of it changed at a time.

    Where the first is not beaten it is kept in the table too: the next problem's config must not
    stand in for it.
    """

    def running(launch: Launch) -> Callable[[], Any]:
        def change(kernel: str, key: Mapping[str, int | str], default: Launch) -> Launch:
            return launch if (kernel, dict(key)) == (pick.kernel, pick.key) else default

        def call() -> Any:
            with watching(change):
                return run()

        return call

    def cost(launch: Launch) -> float:
        """Seconds of three calls; infinite for a config that is wrong or does not run."""
        call = running(launch)
        try:
            return terms.clock(call, 3)[0] if _right(case, call(), train) else math.inf
        except Exception as error:  # too much shared memory, a tile the kernel cannot take, ...
            terms.say(f"{pick.kernel} {launch}: {type(error).__name__}")
            return math.inf

    best, least = pick.launch, cost(pick.launch)
    tried = {str(best)}
    improved = True
    while improved and not terms.over:
        improved = False
        for part in range(len(list(neighbours(best)))):
            for launch in list(neighbours(best))[part]:
                if str(launch) in tried or terms.over:
                    continue
                tried.add(str(launch))
                elapsed = cost(launch)
                if elapsed < least / GAIN:
                    best, least, improved = launch, elapsed, True
    if best == pick.launch:
        return pick
    calls = {"first": running(pick.launch), str(best): running(best)}
    won = terms.fastest(calls, f"{pick.kernel} {dict(pick.key)}, {len(tried)} tried")
    return pick if won == "first" else Pick(pick.kernel, pick.key, best)


def _right(case: Case, output: Any, train: bool) -> bool:
    """Whether outputs, in training gradients, keep the error criterion."""
    if train:
        found = {n: None if t is None else t.cpu() for n, t in output.items()}
        reports = case.judge_gradients(found)
    else:
        outputs = (output,) if isinstance(output, torch.Tensor) else output
        reports = case.judge([t.cpu() for t in outputs])
    return not any(problem for r in reports for problem in r.problems)


def tune_backend(
    spec: OpSpec, sample: Sample, dtype: torch.dtype, train: bool, terms: Terms
) -> Entries:
    """Time the op's backends where it leaves the choice among them to the table; after `tune`."""
    case = Case(spec, sample, dtype)
    run = runner(case, train, terms.device)
    with asking() as asked:
        run("auto")
    found = [a for a in asked if a[0].endswith(".backend") and not terms.has(*a)]
    if not found or terms.over:
        return {}
    what, key = found[0]
    calls: dict[str, Callable[[], Any]] = {}
    for name in ("triton", "vendor", "reference"):
        if name not in spec.dispatcher.backends:
            continue
        call = functools.partial(run, name)
        try:
            output = call()
            if name != "triton" or _right(case, output, train):
                calls[name] = call
        except Exception as error:  # not for this call, or too much memory
            terms.say(f"{spec.name}: {name}: {type(error).__name__}")
    return {what: [{"key": key, "choice": terms.fastest(calls, f"{what} {key}")}]} if calls else {}


def tune_vendor(
    spec: OpSpec, sample: Sample, dtype: torch.dtype, train: bool, terms: Terms
) -> Entries:
    """The fastest of SDPA's kernels and xformers for one unmasked attention on this GPU."""
    case = Case(spec, sample, dtype)
    if set(case.call.arguments) & {"mask", "bias"} or terms.over:
        return {}
    key = vendor.key_of(case.call.arguments["q"], train)
    if terms.has("attention.vendor", key):
        return {}
    run = runner(case, train, terms.device)

    def forced(name: str) -> Any:
        with vendor.forcing(name):
            return run("vendor")

    calls = {}
    for name in vendor.UNMASKED:
        call = functools.partial(forced, name)
        try:
            if _right(case, call(), train):
                calls[name] = call
        except Exception as error:  # not installed, or not for this head dim or card
            terms.say(f"{name}: {type(error).__name__}")
    if not calls:
        return {}
    return {"attention.vendor": [{"key": key, "choice": terms.fastest(calls, f"vendor {key}")}]}
