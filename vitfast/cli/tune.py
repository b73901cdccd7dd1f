"""`vitfast tune`: launch configs for this GPU, by timing, into the table of its architecture."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vitfast.errors import InputValueError

if TYPE_CHECKING:
    from vitfast.ops.spec import OpSpec, Sample

DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--op", action="append", metavar="NAME", help="only this op; may be repeated")
    add("--dtype", action="append", choices=DTYPES, help="default: bfloat16 and float16")
    add("--case", metavar="NAME", help="only the sample of this name, large ones included")
    add("--seconds", type=float, default=1.0, metavar="S", help="timed work a comparison")
    add("--minutes", type=float, default=7.0, metavar="M", help="start nothing after these; "
        "what the table has is not timed again, so that a second run goes on")  # fmt: skip
    add("--quiet", action="store_true", help="only the table's path")


def run(args: argparse.Namespace) -> int:
    import torch

    from vitfast.bench import record, tune
    from vitfast.bench.ops import specs
    from vitfast.runtime import launches

    found_specs = specs(args.op)
    for name in ("seconds", "minutes"):
        value = getattr(args, name)
        if not (value > 0 and math.isfinite(value)):
            raise InputValueError(f"--{name} {value}: expected a positive number")
    if not torch.cuda.is_available():
        raise InputValueError("tune: torch sees no GPU here; configs are timed, not guessed")
    arch = launches.arch_of(torch.device("cuda"))
    record.check_writable(launches.path_of(arch))
    entries = {name: list(old) for name, old in launches.table(arch.name)["kernels"].items()}
    say = (lambda text: None) if args.quiet else print
    end = time.monotonic() + 60 * args.minutes
    dtypes = args.dtype or DTYPES[:2]
    for i, spec in enumerate(found_specs):
        # Each op gets an equal part of what is left.
        until = time.monotonic() + max(end - time.monotonic(), 0.0) / (len(found_specs) - i)
        for sample, name, train in _problems(spec, args.case, dtypes):
            title = f"{spec.name} {sample.name} {name} {'train' if train else 'infer'}"
            if time.monotonic() > until:
                say(f"{title}: left out, out of time")
                continue
            say(title)
            terms = tune.Terms(seconds=args.seconds, until=until, known=entries, say=say)
            for search in tune.searches(spec):
                _add(entries, search(spec, sample, getattr(torch, name), train, terms))
                launches.write_table(
                    arch, kernels=entries
                )  # later searches run with what was found
    print(launches.write_table(arch, kernels=entries))
    return 0


def _problems(
    spec: OpSpec, case: str | None, dtypes: Sequence[str]
) -> Iterator[tuple[Sample, str, bool]]:
    """(sample, dtype, whether training) of what is timed of one op."""
    for sample in spec.samples:
        if sample.name == case if case else "real" in sample.tags and "large" not in sample.tags:
            for name in dtypes:
                for train in (False, True):
                    yield sample, name, train


def _add(entries: dict[str, Any], found: dict[str, Any]) -> None:
    """Add what was found to the table's entries, in place of those with the same key."""
    for kernel, new in found.items():
        keys = [e["key"] for e in new]
        entries[kernel] = [e for e in entries.get(kernel, []) if e["key"] not in keys] + new
