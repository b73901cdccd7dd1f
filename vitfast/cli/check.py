"""`vitfast check`: every op, backend and family on this machine, against float64."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vitfast.errors import InputValueError

if TYPE_CHECKING:
    from vitfast.bench.verify import Finding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    add("--op", action="append", metavar="NAME", help="only this op; may be repeated; no models")
    add("--seed", type=int, default=0, help="first of the random problems on a GPU")
    add("--json", metavar="FILE", help="write the findings too")
    add("--trust", action="store_true", help="on a GPU: from now on pick, on this architecture, "
        "the Triton kernels of every op that was right here")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    import torch

    from vitfast.bench import machine, record, verify
    from vitfast.bench.ops import specs
    from vitfast.bench.progress import progress_bar
    from vitfast.runtime import tuning

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputValueError("--device cuda: torch sees no GPU here")
    if args.trust and device != "cuda":
        raise InputValueError("--trust is for GPUs: CPU kernels are trusted by the tests")
    if args.json:
        record.check_writable(args.json)
    if args.trust:
        arch = tuning.arch_of(torch.device("cuda"))
        record.check_writable(tuning.path_of(arch))
    cases = verify.op_cases(specs(args.op))
    models = [] if args.op else [(f, d) for f in verify.MODELS for d in verify.MODEL_DTYPES]
    found: list[Finding] = []
    checked = specs(args.op) if device == "cuda" else []
    with progress_bar(len(cases) + len(models) + len(checked)) as show:
        for i, (spec, sample) in enumerate(cases):
            show(f"{spec.name} {sample.name}", i)
            found += verify.check_op(spec, sample, device)
        for i, (family, dtype) in enumerate(models):
            show(f"{family}: {verify.MODELS[family]}", len(cases) + i)
            found += verify.check_model(family, dtype, device)
        for i, spec in enumerate(checked):
            show(f"{spec.name}: hardware", len(cases) + len(models) + i)
            found += verify.check_hardware(spec, args.seed)
    _show(found, machine.device_name(device))
    if args.json:
        kept = record.document(
            "check", machine.describe(device), seed=args.seed, verified=verify.verified(found),
            findings=verify.as_json(found),
        )  # fmt: skip
        record.write_json(args.json, kept)
    if args.trust:
        tuning.write_table(arch, verified=verify.verified(found))
    return int(any(f.state == verify.WRONG for f in found))


def _show(found: Sequence[Finding], where: str) -> None:
    from vitfast.bench import verify
    from vitfast.cli.table import print_table

    wrong = [f for f in found if f.state == verify.WRONG]
    if wrong:
        print_table(
            "Wrong",
            ("what", "case", "dtype", "pass", "backend", "reason"),
            [(f.name, f.case, f.dtype, f.passes, f.backend, f.reason) for f in wrong],
        )
    for title, (header, lines) in (
        (f"Ops on {where}: worst error over budget, 1 is the limit", verify.op_table(found)),
        ("Swapped models: worst error over budget, 1 is the limit", verify.model_table(found)),
    ):
        if lines:
            print_table(title, header, sorted(lines, key=lambda line: "wrong" not in line))
    refused = Counter((f.name, f.backend, f.reason) for f in found if f.state == verify.REFUSED)
    if refused:
        print_table(
            "Cannot run here",
            ("op", "backend", "cases", "reason"),
            [(op, backend, n, reason) for (op, backend, reason), n in refused.items()],
        )
    checked = sum(f.state != verify.REFUSED for f in found)
    print(f"{checked - len(wrong)} of {checked} checks passed")
