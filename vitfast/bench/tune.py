"""Finding launch configs by timing, once, for a table that is then committed.

Every kernel that an op launches on a sample is tried with its neighbours: each tile size halved and
doubled, other numbers of warps and stages. A config must give what the heuristic's gives, within
the error criterion, and win by more than the noise.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vitfast import ops
from vitfast.bench.timer import Stopwatch, interleave, stopwatch
from vitfast.ops.attention import vendor
from vitfast.ops.spec import OpSpec, Sample
from vitfast.runtime.tuning import Launch, asking, watching
from vitfast.testing.cases import Case

GAIN = 1.02
"""A config that is not this much faster than the heuristic's is not worth a line in a table."""


@dataclass(frozen=True)
class Pick:
    """One launch that a call made: which kernel, what its config depended on, and the config."""

    kernel: str
    key: Mapping[str, int | str]
    launch: Launch

    def entry(self) -> dict[str, Any]:
        return {
            "key": dict(self.key),
            "blocks": dict(self.launch.blocks),
            "num_warps": self.launch.num_warps,
            "num_stages": self.launch.num_stages,
        }


def picks_of(call: Callable[[], Any]) -> list[Pick]:
    """The launches of a call, each kernel and key once."""
    found: dict[Any, Pick] = {}

    def note(kernel: str, key: Mapping[str, int | str], launch: Launch) -> Launch:
        found[kernel, tuple(sorted(key.items()))] = Pick(kernel, dict(key), launch)
        return launch

    with watching(note):
        call()
    return list(found.values())


def neighbours(launch: Launch) -> Iterator[Launch]:
    """Configs to try beside one: tiles from a half to twice, switches, 2 to 8 warps, 1 to 4 stages.

    A block of size 0 or 1 that is not called BLOCK_... or ROWS is a switch.
    """
    names = list(launch.blocks)
    sizes = [
        [s for s in (b // 2, b, b * 2) if 1 <= s <= 256]
        if name.startswith(("BLOCK", "ROWS"))
        else [0, 1]
        for name, b in launch.blocks.items()
    ]
    for blocks in itertools.product(*sizes):
        for warps, stages in itertools.product((2, 4, 8), (1, 2, 3, 4)):
            other = Launch(dict(zip(names, blocks, strict=True)), warps, stages)
            if other != launch:
                yield other


def runner(case: Case, train: bool, device: str) -> Callable[..., Any]:
    """(backend="triton") -> the outputs of a case, or its gradients."""
    call = case.call.map(lambda t: t.to(device))
    grads = [g.to(device) for g in case.output_grads] if train else []

    def run(backend: str = "triton") -> Any:
        if train:
            return call.gradients(case.spec.public, grads, names=case.trained, backend=backend)
        with torch.no_grad():
            return call.run(case.spec.public, backend=backend)

    return run


def tune(
    spec: OpSpec,
    sample: Sample,
    dtype: torch.dtype,
    train: bool,
    *,
    device: str = "cuda",
    seconds: float = 10.0,
    watch: Stopwatch | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, list[dict[str, Any]]]:
    """Table entries {kernel: [entry]} for the kernels of one op on one sample."""
    case = Case(spec, sample, dtype)
    run = runner(case, train, device)
    found: dict[str, list[dict[str, Any]]] = {}
    for pick in picks_of(run):
        best = _best(pick, run, case, train, seconds, watch or stopwatch(device), say)
        if best is not None:
            found.setdefault(pick.kernel, []).append(best.entry())
    return found


def _best(
    pick: Pick, run: Callable[[], Any], case: Case, train: bool, seconds: float,
    watch: Stopwatch, say: Callable[[str], None],
) -> Pick | None:  # fmt: skip
    """The fastest right neighbour of a pick; None where nothing beats it."""

    def running(launch: Launch) -> Callable[[], Any]:
        def change(kernel: str, key: Mapping[str, int | str], default: Launch) -> Launch:
            return launch if (kernel, dict(key)) == (pick.kernel, pick.key) else default

        def call() -> Any:
            with watching(change):
                return run()

        return call

    start, _ = watch(running(pick.launch), 3)
    calls = {"heuristic": running(pick.launch)}
    launches = {"heuristic": pick.launch}
    for launch in neighbours(pick.launch):
        call = running(launch)
        try:
            output = call()
            if not _right(case, output, train):
                continue
            elapsed, _ = watch(call, 3)
        except Exception as error:  # too much shared memory, a tile the kernel cannot take, ...
            say(f"{pick.kernel} {launch}: {type(error).__name__}")
            continue
        if elapsed < 1.1 * start:
            calls[str(launch)], launches[str(launch)] = call, launch
    times = interleave(calls, seconds=seconds, watch=watch)
    best = min(times, key=lambda name: times[name].median)
    gain = times["heuristic"].median / times[best].median
    say(f"{pick.kernel} {dict(pick.key)}: {best}, {gain:.2f} times the heuristic's speed")
    return Pick(pick.kernel, pick.key, launches[best]) if gain > GAIN else None


def _right(case: Case, output: Any, train: bool) -> bool:
    if train:
        found = {n: None if t is None else t.cpu() for n, t in output.items()}
        reports = case.judge_gradients(found)
    else:
        outputs = (output,) if isinstance(output, torch.Tensor) else output
        reports = case.judge([t.cpu() for t in outputs])
    return not any(problem for r in reports for problem in r.problems)


def tune_backend(
    spec: OpSpec, sample: Sample, dtype: torch.dtype, train: bool, *, device: str = "cuda",
    seconds: float = 4.0, watch: Stopwatch | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """Whether Triton's kernels win where the op leaves that to the table; after `tune`."""
    case = Case(spec, sample, dtype)
    run = runner(case, train, device)
    with asking() as asked:
        run("auto")
    keys = [(what, key) for what, key in asked if what.endswith(".backend")]
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
            say(f"{spec.name}: {name}: {type(error).__name__}")
    if not keys or not calls:
        return {}
    times = interleave(calls, seconds=seconds, watch=watch or stopwatch(device))
    best = min(times, key=lambda name: times[name].median)
    what, key = keys[0]
    say(f"{what} {key}: {best}, " + ", ".join(f"{n} {t.median:.2e} s" for n, t in times.items()))
    return {what: [{"key": key, "choice": best}]}


def tune_vendor(
    sample: Sample, dtype: torch.dtype, train: bool, *, seconds: float = 4.0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """The fastest of SDPA's kernels and xformers for one unmasked attention on this GPU."""
    spec = ops.spec_of("attention")
    case = Case(spec, sample, dtype)
    if set(case.call.arguments) & {"mask", "bias"}:
        return {}
    call = case.call.map(lambda t: t.to("cuda"))
    grads = [g.to("cuda") for g in case.output_grads] if train else []

    def running(name: str) -> Callable[[], Any]:
        def run() -> Any:
            with vendor.forcing(name):
                if train:
                    return call.gradients(spec.public, grads, names=["q"], backend="vendor")
                with torch.no_grad():
                    return call.run(spec.public, backend="vendor")

        return run

    calls = {}
    for name in vendor.UNMASKED:
        try:
            if _right(case, running(name)(), train):
                calls[name] = running(name)
        except Exception as error:  # not installed, or not for this head dim or card
            say(f"{name}: {type(error).__name__}")
    times = interleave(calls, seconds=seconds, watch=stopwatch("cuda"))
    best = min(times, key=lambda name: times[name].median)
    q = call.arguments["q"]
    key = vendor.key_of(q, train)
    say(f"{key}: {best}, {times[best].median * 1e6:.0f} us")
    return {"attention.vendor": [{"key": key, "choice": best}]}
