"""`vitfast bench`: ops, blocks or whole models, timed in turns beside their peers."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vitfast.cli.device import chosen_device
from vitfast.cli.table import print_table, print_text
from vitfast.errors import InputValueError

if TYPE_CHECKING:
    from vitfast.bench.peers import Setting
    from vitfast.bench.record import Change, Row
    from vitfast.bench.suite import Options, Part

DTYPES = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16",
          "float16": "float16", "fp16": "float16"}  # fmt: skip
DEFAULT_MODEL = "vit_base_patch16_224"
GPU_PEERS = "eager,compile,triton,vendor,cudnn,flash,efficient,xformers"
"""On a GPU, for ops."""
DEFAULT_SECONDS = {"ops": 1.0, "blocks": 4.0, "models": 8.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("level", nargs="?", choices=tuple(DEFAULT_SECONDS), help="single ops, one block, or whole "
        "models; without: the standard set of this machine, in bfloat16 on a GPU")  # fmt: skip
    add("--model", action="append", metavar="NAME", help="timm model; may be repeated: one "
        "table of all, CNNs in which nothing is swapped included. Default: "
        f"{DEFAULT_MODEL}; for ops the shapes listed with each op")  # fmt: skip
    add("--img-size", metavar="HxW", help="such as 224 or 2160x3840; each model's own by default")
    add("--batch", type=int, default=1, metavar="B")
    add("--dtype", choices=tuple(DTYPES), help="float32 by default; others run under autocast")
    add("--pass", dest="passes", choices=("infer", "train"), default="infer",
        help="forward, or forward and backward")  # fmt: skip
    add("--peers", metavar="P,Q", help="of eager, compile, onnxruntime, openvino; for ops also "
        "cuda, triton, vendor, cpu, and for attention on a GPU cudnn, flash, efficient, xformers. "
        "Default: eager (ops: eager,vendor); on a GPU all that run there")  # fmt: skip
    add("--op", action="append", metavar="NAME", help="only this op; may be repeated")
    add("--case", metavar="NAME", help="only the op samples of this name, large ones included")
    add("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    add("--seconds", type=float, metavar="S", help="timed work a case")
    add("--minutes", type=float, metavar="M", help="without a level: start nothing after these")
    add("--no-memory", action="store_true", help="leave out peak memory (a process a contender)")
    add("--json", metavar="FILE", help="write the results too")
    add("--compare", metavar="FILE", help="show the change against an earlier --json file; exit "
        "status 1 if a ratio got more than 10 %% worse")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from vitfast.bench import machine, record, suite
    from vitfast.bench.progress import of_part, progress_bar

    # Everything a user can get wrong is found before the long work.
    setting = _setting(args)
    options = _options(args, setting.device)
    earlier = record.read(args.compare) if args.compare else None
    if args.json:
        record.check_writable(args.json)
    parts = _parts(args) if args.level else suite.PARTS[setting.device]
    minutes = math.inf
    if not args.level:
        _refuse_choices(args)
        minutes = _minutes(args, suite.MINUTES[setting.device])
    facts = machine.describe(setting.device)
    rows: list[Row] = []
    notes: list[str] = []

    def keep(rows: list[Row], notes: list[str]) -> None:
        if args.json:
            floors = machine.floors(setting.device, setting.dtype)
            kept = record.bench_document(rows, facts, floors=floors, left_out=notes)
            record.write_json(args.json, kept)

    if args.level and len(parts) == 1:
        found = suite.cases(parts[0], setting, options)
        with progress_bar(len(found)) as show:
            for i, measure in enumerate(found):
                rows.append(measure(of_part(show, i)))
    else:
        with progress_bar(len(parts)) as show:
            rows, notes = suite.run(parts, setting, options, minutes, show, keep=keep)
        if args.level and not rows:
            raise InputValueError("; ".join(notes))
    floors = machine.floors(setting.device, setting.dtype)
    _show(rows, facts, floors, list(dict.fromkeys(n for names in options.wanted.values()
                                                  for n in names)))  # fmt: skip
    for note in notes:
        print_text(note)
    keep(rows, notes)
    failed = bool(args.level and notes)  # a model that was asked for by name has no row
    if earlier is None:
        return int(failed)
    changed = record.changes(earlier, rows)
    _show_changes(changed, rows, args.compare)
    return int(failed or any(change.worse for change in changed))


def _setting(args: argparse.Namespace) -> Setting:
    """Dtype, device and pass."""
    import torch

    from vitfast.bench.peers import Setting

    device = chosen_device(args.device)
    dtype = args.dtype or ("bf16" if device == "cuda" and not args.level else "fp32")
    return Setting(getattr(torch, DTYPES[dtype]), device, args.passes == "train")


def _options(args: argparse.Namespace, device: str) -> Options:
    """Peers and times by level, those of the arguments or else the device's own."""
    from vitfast.bench import ops, peers, suite

    if args.seconds is not None and not (args.seconds > 0 and math.isfinite(args.seconds)):
        raise InputValueError(f"--seconds {args.seconds}: expected a positive number")
    default = {"cpu": ("eager,vendor", "eager"), "cuda": (GPU_PEERS, "eager,compile")}
    for_ops, for_models = default[device]
    of_ops = peers.parse(
        args.peers or for_ops, (*peers.PEERS, *ops.BACKENDS, *ops.ATTENTION_KERNELS)
    )
    of_models = of_ops
    if args.level != "ops":
        of_models = peers.parse(args.peers or for_models)
    wanted = {"ops": of_ops, "blocks": of_models, "models": of_models}
    if args.level:
        wanted = {args.level: wanted[args.level]}
    seconds = {k: v if args.seconds is None else args.seconds for k, v in DEFAULT_SECONDS.items()}
    return suite.Options(wanted, seconds, not args.no_memory)


def _parts(args: argparse.Namespace) -> list[Part]:
    """What the arguments describe: a part for each model."""
    from vitfast.bench import ops, suite, zoo

    if args.batch < 1:
        raise InputValueError(f"--batch {args.batch}: expected at least 1")
    if args.minutes is not None:
        raise InputValueError("--minutes is for `vitfast bench` without a level")
    size = None if args.img_size is None else zoo.parse_img_size(args.img_size)
    models: list[str | None] = list(dict.fromkeys(args.model or ()))
    if args.level != "ops":
        if args.op or args.case:
            raise InputValueError(f"--op and --case go with `vitfast bench ops`, not {args.level}")
        models = models or [DEFAULT_MODEL]
    elif not models and (size is not None or args.batch != 1):
        raise InputValueError("--img-size and --batch need --model: they are a model's")
    elif models and args.case:
        raise InputValueError("--case names a sample of the specs; leave out --model")
    for name in models:
        zoo.check_name(name or "")
    chosen = tuple(args.op or ())
    ops.specs(chosen)  # raises for a name that is none
    train = args.passes == "train"
    return [
        suite.Part(args.level, model, size, args.batch, train, chosen, args.case)
        for model in models or [None]
    ]


def _refuse_choices(args: argparse.Namespace) -> None:
    """The standard set takes no choices of cases."""
    given = {"--model": args.model, "--img-size": args.img_size, "--op": args.op,
             "--case": args.case, "--pass train": args.passes == "train",
             "--batch": args.batch != 1}  # fmt: skip
    for name, value in given.items():
        if value:
            raise InputValueError(f"{name} needs a level: vitfast bench ops, blocks or models")


def _minutes(args: argparse.Namespace, default: float) -> float:
    """The time for the standard set."""
    minutes = default if args.minutes is None else args.minutes
    if not (minutes > 0 and math.isfinite(minutes)):
        raise InputValueError(f"--minutes {args.minutes}: expected a positive number")
    return minutes


def _show(
    rows: Sequence[Row], facts: dict[str, Any], floors: dict[str, float], names: Sequence[str]
) -> None:
    """Print the table of results, with the machine and its ceilings in the title."""
    from vitfast.bench import report

    title = f"{facts['name']}; torch {facts['versions']['torch']}"
    ceilings = f"ceilings: {floors['gflops']:.0f} GFLOP/s, {floors['gbs']:.0f} GB/s"
    header, cells, notes = report.table(rows, names)
    print_table(f"{title}; {ceilings}", header, cells)
    for note in notes:
        print_text(note)


def _show_changes(found: Sequence[Change], rows: Sequence[Row], path: str) -> None:
    """Print how ratios changed against an earlier file."""
    if not found:
        print_text(f"{path} has none of these cases, or no ratio of vitfast in them")
        return
    cells = [
        (" ".join(c.key[1:5]), c.peer, f"{c.before:.2f}x", f"{c.after:.2f}x",
         f"{c.relative:+.1%}", "worse" if c.worse else "")
        for c in found
    ]  # fmt: skip
    print_table(f"Against {path}", ("case", "peer", "before", "now", "change", ""), cells)
    compared = {change.key for change in found}
    rest = dict.fromkeys(row.case for row in rows if row.key not in compared)
    if rest:
        print_text(f"not compared, no ratio in both files: {', '.join(rest)}")
