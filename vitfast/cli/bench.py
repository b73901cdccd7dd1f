"""`vitfast bench`: ops, blocks or whole models, timed in turns beside their peers."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vitfast.errors import InputValueError

if TYPE_CHECKING:
    from vitfast.bench.record import Change, Row

DTYPES = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16",
          "float16": "float16", "fp16": "float16"}  # fmt: skip
DEFAULT_MODEL = "vit_base_patch16_224"
DEFAULT_SECONDS = {"ops": 1.0, "blocks": 4.0, "models": 8.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("level", choices=tuple(DEFAULT_SECONDS), help="single ops, one block, or whole models")
    add("--model", metavar="NAME", help=f"timm model; {DEFAULT_MODEL} for blocks and models, "
        "and for ops the shapes listed with each op")  # fmt: skip
    add("--img-size", metavar="HxW", help="such as 224 or 2160x3840; the model's own by default")
    add("--batch", type=int, default=1, metavar="B")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="other than float32: autocast")
    add("--pass", dest="passes", choices=("infer", "train"), default="infer",
        help="forward, or forward and backward")  # fmt: skip
    add("--peers", metavar="P,Q", help="of eager, compile, onnxruntime, openvino; for ops also "
        "cuda, triton, vendor, cpu. Default: eager (ops: eager,vendor)")  # fmt: skip
    add("--op", action="append", metavar="NAME", help="only this op; may be repeated")
    add("--case", metavar="NAME", help="only the op samples of this name, large ones included")
    add("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    add("--seconds", type=float, metavar="S", help="timed work a case")
    add("--no-memory", action="store_true", help="leave out peak memory (a process a contender)")
    add("--json", metavar="FILE", help="write the results too")
    add("--compare", metavar="FILE", help="show the change against an earlier --json file; exit "
        "status 1 if a ratio got more than 10 %% worse")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from vitfast.bench import machine, record
    from vitfast.bench.progress import progress_bar

    plan = _plan(args)  # everything a user can get wrong is found before the long work
    earlier = record.read(args.compare) if args.compare else None
    if args.json:
        record.check_writable(args.json)
    setting = plan.setting
    rows: list[Row] = []
    with progress_bar(len(plan.cases)) as show:
        for i, measure in enumerate(plan.cases):
            rows.append(measure(lambda text, share, i=i: show(text, i + min(share, 1.0))))
        floors = machine.floors(setting.device, setting.dtype)
    facts = machine.describe(setting.device)
    _show(rows, facts, floors, plan.names)
    if args.json:
        record.write_json(args.json, record.document(rows, facts, floors=floors))
    if earlier is None:
        return 0
    found = record.changes(earlier, rows)
    _show_changes(found, args.compare)
    return int(any(change.worse for change in found))


class _Plan:
    """What will run: `cases`, each a call (progress) -> Row; the peers' names; the setting."""

    def __init__(
        self, cases: Sequence[Callable[[Any], Row]], names: Sequence[str], setting: Any
    ) -> None:
        self.cases = cases
        self.names = names
        self.setting = setting


def _plan(args: argparse.Namespace) -> _Plan:
    import torch

    from vitfast.bench import modules, ops, peers, zoo

    if args.batch < 1:
        raise InputValueError(f"--batch {args.batch}: expected at least 1")
    seconds = DEFAULT_SECONDS[args.level] if args.seconds is None else args.seconds
    if not (seconds > 0 and math.isfinite(seconds)):
        raise InputValueError(f"--seconds {args.seconds}: expected a positive number")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputValueError("--device cuda: torch sees no GPU here")
    setting = peers.Setting(getattr(torch, DTYPES[args.dtype]), device, args.passes == "train")
    size = None if args.img_size is None else zoo.parse_img_size(args.img_size)
    if args.level == "ops":
        names = peers.parse(args.peers or "eager,vendor", (*peers.PEERS, *ops.BACKENDS))
        return _Plan(_op_cases(args, setting, size, names, seconds), names, setting)
    if args.op or args.case:
        raise InputValueError(f"--op and --case go with `vitfast bench ops`, not {args.level}")
    names = peers.parse(args.peers or "eager")
    model = args.model or DEFAULT_MODEL
    zoo.check_name(model)

    def measure(progress: Any) -> Row:
        build = modules.block_case if args.level == "blocks" else modules.model_case
        progress(f"building {model}", 0.0)
        row = modules.measure(
            build(model, size, args.batch, setting), names, seconds=seconds,
            with_memory=not args.no_memory, progress=progress,
        )  # fmt: skip
        if args.level == "models" and not args.no_memory:
            arguments = {
                "model": model, "img_size": size, "batch": args.batch, "dtype": row.dtype,
                "device": device, "train": setting.train, "threads": torch.get_num_threads(),
            }  # fmt: skip
            modules.add_model_memory(row, arguments, progress)
        return row

    return _Plan([measure], names, setting)


def _op_cases(
    args: argparse.Namespace, setting: Any, size: Any, names: Sequence[str], seconds: float
) -> list[Callable[[Any], Row]]:
    from vitfast.bench import ops

    specs = ops.specs(args.op)
    if args.model is None:
        if size is not None or args.batch != 1:
            raise InputValueError("--img-size and --batch need --model: they are a model's")
        cases = ops.real_cases(specs, setting, args.case)
    else:
        if args.case:
            raise InputValueError("--case names a sample of the specs; leave out --model")
        cases = ops.model_cases(specs, args.model, size, args.batch, setting)
    if not cases:
        wanted = ", ".join(args.op or ["any op"])
        what = f"sample {args.case!r}" if args.case else args.model or "sample"
        raise InputValueError(f"nothing to time: no {args.dtype} call of {wanted} in {what}")
    return [
        functools.partial(_measure_op, case, names, seconds, not args.no_memory) for case in cases
    ]


def _measure_op(
    case: Any, names: Sequence[str], seconds: float, with_memory: bool, progress: Any
) -> Row:
    from vitfast.bench import ops

    return ops.measure(case, names, seconds=seconds, with_memory=with_memory, progress=progress)


def _show(
    rows: Sequence[Row], facts: dict[str, Any], floors: dict[str, float], names: Sequence[str]
) -> None:
    from vitfast.bench import report
    from vitfast.cli.table import print_table

    title = f"{facts['name']}; torch {facts['versions']['torch']}"
    ceilings = f"ceilings: {floors['gflops']:.0f} GFLOP/s, {floors['gbs']:.0f} GB/s"
    header, cells, notes = report.table(rows, names)
    print_table(f"{title}; {ceilings}", header, cells)
    for note in notes:
        print(note)


def _show_changes(found: Sequence[Change], path: str) -> None:
    from vitfast.cli.table import print_table

    if not found:
        print(f"{path} has none of these cases")
        return
    cells = [
        (" ".join(c.key[1:5]), c.peer, f"{c.before:.2f}x", f"{c.after:.2f}x",
         f"{c.relative:+.1%}", "worse" if c.worse else "")
        for c in found
    ]  # fmt: skip
    print_table(f"Against {path}", ("case", "peer", "before", "now", "change", ""), cells)
