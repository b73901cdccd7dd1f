"""`vitfast tune`: launch configs for this GPU, by timing, into the table of its architecture."""

from __future__ import annotations

import argparse
from typing import Any

from vitfast.errors import InputValueError

DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--op", action="append", metavar="NAME", help="only this op; may be repeated")
    add("--dtype", action="append", choices=DTYPES, help="default: bfloat16 and float16")
    add("--case", metavar="NAME", help="only the sample of this name, large ones included")
    add("--seconds", type=float, default=4.0, metavar="S", help="timed work a kernel and case")
    add("--quiet", action="store_true", help="only the table's path")


def run(args: argparse.Namespace) -> int:
    import torch

    from vitfast.bench import record, tune
    from vitfast.bench.ops import specs
    from vitfast.runtime import tuning

    found_specs = specs(args.op)
    if not torch.cuda.is_available():
        raise InputValueError("tune: torch sees no GPU here; configs are timed, not guessed")
    if not args.seconds > 0:
        raise InputValueError(f"--seconds {args.seconds}: expected a positive number")
    arch = tuning.arch_of(torch.device("cuda"))
    record.check_writable(tuning.path_of(arch))
    entries = {name: list(old) for name, old in tuning.table(arch.name)["kernels"].items()}
    say = (lambda text: None) if args.quiet else print
    for spec in found_specs:
        samples = [
            s
            for s in spec.samples
            if (s.name == args.case if args.case else "real" in s.tags and "large" not in s.tags)
        ]
        for sample in samples:
            for name in args.dtype or DTYPES[:2]:
                for train in (False, True):
                    say(f"{spec.name} {sample.name} {name} {'train' if train else 'infer'}")
                    found = {}
                    if "triton" in spec.dispatcher.backends:
                        found = tune.tune(
                            spec, sample, getattr(torch, name), train,
                            seconds=args.seconds, say=say,
                        )  # fmt: skip
                    if spec.name == "attention":
                        found |= tune.tune_vendor(sample, getattr(torch, name), train, say=say)
                    _add(entries, found)
                    tuning.write_table(arch, kernels=entries)  # an interrupted run keeps its work
                    if "triton" in spec.dispatcher.backends:
                        # Both sides as they are now tuned.
                        _add(entries, tune.tune_backend(
                            spec, sample, getattr(torch, name), train, say=say
                        ))  # fmt: skip
    print(tuning.write_table(arch, kernels=entries))
    return 0


def _add(entries: dict[str, Any], found: dict[str, Any]) -> None:
    """Entries of the same key are replaced."""
    for kernel, new in found.items():
        keys = [e["key"] for e in new]
        entries[kernel] = [e for e in entries.get(kernel, []) if e["key"] not in keys] + new
