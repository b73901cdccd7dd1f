"""`vitfast check`: every op, backend and family on this machine, against float64.

On a GPU the families only: ops are judged there in processes of their own, by `vitfast prove`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from vitfast.check.findings import (
    REFUSED,
    WRONG,
    Finding,
    as_json,
    model_table,
    op_table,
)
from vitfast.cli.device import chosen_device
from vitfast.cli.table import print_table
from vitfast.errors import InputValueError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    add("--op", action="append", metavar="NAME", help="only this op; may be repeated; no models")
    add(
        "--minutes",
        type=float,
        metavar="M",
        help="start nothing after these; on a GPU 7 by default",
    )
    add("--json", metavar="FILE", help="write the findings too")


def run(args: argparse.Namespace) -> int:

    from vitfast.bench import machine, record
    from vitfast.bench.ops import specs
    from vitfast.bench.progress import progress_bar
    from vitfast.check import numerics
    from vitfast.selftest.judge import plain_arithmetic

    device = chosen_device(args.device)
    if args.minutes is None:
        args.minutes = 7.0 if device == "cuda" else math.inf
    if not args.minutes > 0:
        raise InputValueError(f"--minutes {args.minutes}: expected a positive number")
    if args.json:
        record.check_writable(args.json)
    if device == "cuda" and args.op:
        raise InputValueError("--op on a GPU: vitfast prove --op judges its kernels there")
    models = [] if args.op else [(f, d) for f in numerics.MODELS for d in numerics.MODEL_DTYPES]
    cases = [] if device == "cuda" else numerics.op_cases(specs(args.op))
    end = time.monotonic() + 60 * args.minutes
    found: list[Finding] = []
    left_out: list[str] = []

    def stages() -> Iterator[tuple[str, Callable[[], Iterable[Finding]]]]:
        for family, dtype in models:
            name = f"{family}: {numerics.MODELS[family]}"
            yield name, partial(numerics.check_model, family, dtype, device)

    def keep() -> None:
        if args.json:
            facts = machine.describe(device)
            record.write_json(args.json, record.document(
                "check", facts, left_out=left_out, findings=as_json(found)
            ))  # fmt: skip

    with (
        progress_bar(len(cases) + len(models)) as show,
        plain_arithmetic(),
    ):
        for i, (spec, sample) in enumerate(cases):
            show(f"{spec.name} {sample.name}", i)
            found += numerics.check_op(spec, sample)
        keep()
        for i, (name, check) in enumerate(stages()):
            show(name, len(cases) + i)
            if time.monotonic() > end:
                left_out.append(name)
                continue
            found += check()
            keep()
    _show(found, machine.device_name(device))
    for name in left_out:
        print(f"{name}: left out, out of time")
    keep()
    return int(any(f.state == WRONG for f in found))


def _show(found: Sequence[Finding], where: str) -> None:
    """Print what is wrong first, then the tables, what cannot run, and the count."""
    wrong = [f for f in found if f.state == WRONG]
    if wrong:
        print_table(
            "Wrong",
            ("what", "case", "dtype", "pass", "backend", "reason"),
            [(f.name, f.case, f.dtype, f.passes, f.backend, f.reason) for f in wrong],
        )
    for title, (header, lines) in (
        (f"Ops on {where}: worst error over budget, 1 is the limit", op_table(found)),
        ("Swapped models: worst error over budget, 1 is the limit", model_table(found)),
    ):
        if lines:
            print_table(title, header, sorted(lines, key=lambda line: "wrong" not in line))
    refused = Counter((f.name, f.backend, f.reason) for f in found if f.state == REFUSED)
    if refused:
        print_table(
            "Cannot run here",
            ("op", "backend", "cases", "reason"),
            [(op, backend, n, reason) for (op, backend, reason), n in refused.items()],
        )
    checked = sum(f.state != REFUSED for f in found)
    print(f"{checked - len(wrong)} of {checked} checks passed")
