"""`vitfast prove`: what this GPU shows of vitfast's kernels, in one run of a few minutes."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from vitfast.cli.table import print_table
from vitfast.errors import InputValueError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--json", metavar="DIR", required=True,
        help="folder for prove.json and this architecture's table; written after every item",
    )  # fmt: skip
    add("--seconds", type=float, default=590.0, metavar="S", help="all of it ends by then")
    add("--op", action="append", metavar="NAME", help="only this op; may be repeated")
    add("--quiet", action="store_true", help="only the tables at the end")


def run(args: argparse.Namespace) -> int:
    import torch

    from vitfast.bench.ops import specs
    from vitfast.check import prove
    from vitfast.runtime import triton

    if not (args.seconds > 0 and math.isfinite(args.seconds)):
        raise InputValueError(f"--seconds {args.seconds}: expected a positive number")
    ops = prove.ops_named(spec.name for spec in specs(args.op))
    if triton.available():
        raise InputValueError(f"prove: {'; '.join(triton.available())}")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    folder = Path(args.json)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputValueError(f"--json {folder}: {error}") from error
    say = (lambda text: None) if args.quiet else (lambda text: print(text, flush=True))
    kept = prove.prove(device, folder, ops, args.seconds, say)
    print_table("Stages", ("stage", "done", "not right", "left out"), prove.summary(kept))
    if prove.ratios(kept):
        print_table("Time over vitfast's", ("what", "beside", "ratio"), prove.ratios(kept))
    return int(not prove.is_right(kept))
