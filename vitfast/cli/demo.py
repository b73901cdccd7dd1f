"""`vitfast demo`: real models on a real photograph, timm beside vitfast, and a report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vitfast.cli.device import chosen_device

if TYPE_CHECKING:
    from vitfast.demo.showcase import Outcome

REPORT = "vitfast-demo.html"
DTYPES = {"float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--image", metavar="PATH", help="a photograph; one is built in")
    add("--pretrained", action="store_true", help="trained weights (from the network or cache)")
    add("--models", metavar="NAME[@SIZE],...", help="timm models; ViT-B/16 at 224 and 1024, "
        "ConvNeXt-T, DINOv2 and DINOv3 ViT-S by default")  # fmt: skip
    add("--dtype", choices=tuple(DTYPES), default="float32", help="bf16: under autocast")
    add("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    add("--output", metavar="PATH", default=REPORT, help=f"file or folder; {REPORT} by default")


def run(args: argparse.Namespace) -> int:
    import torch

    from vitfast.bench import machine, peers, record
    from vitfast.bench.progress import of_part, progress_bar
    from vitfast.demo import page, photo, showcase

    target = Path(args.output)
    target = record.check_writable(target / REPORT if target.is_dir() else target)
    models = showcase.parse_models(args.models)
    picture, credit = photo.load(args.image)
    device = chosen_device(args.device)
    setting = peers.Setting(getattr(torch, DTYPES[args.dtype]), device)
    outcomes: list[Outcome] = []
    with progress_bar(len(models)) as show:
        show("warming up", 0.0)
        stage = showcase.Showcase(picture, setting, pretrained=args.pretrained)
        stage.warm_up()
        for i, (name, size) in enumerate(models):
            outcomes.append(stage.run(name, size, of_part(show, i)))
    facts = machine.describe(device)
    _show(outcomes, facts["name"], credit)
    record.write_text(target, page.render(outcomes, facts, picture, credit, args.pretrained))
    print(f"report: {target}")
    return int(not all(outcome.within_budget for outcome in outcomes))


def _show(outcomes: Sequence[Outcome], where: str, credit: str) -> None:
    """Print what was swapped, the times beside timm's, and how errors were judged."""
    from vitfast.bench.report import MISSING, digits, megabytes, milliseconds
    from vitfast.cli.table import print_table, print_text

    print_text(where)
    print_text(f"photograph: {credit}")
    print()
    print_table(
        "Swapped",
        ("model", "modules"),
        [(o.title, o.swapped_classes()) for o in outcomes],
    )
    left = [(o.title, line) for o in outcomes for line in o.skipped_reasons()]
    if left:
        print_table("Left to timm", ("model", "modules and reason"), left)
    print_table(
        "timm beside vitfast",
        ("model", "dtype", "timm", "vitfast", "faster", "MB timm", "MB vitfast", "error",
         "budget", "top-5"),
        [
            (o.title, o.dtype, milliseconds(o.timm_ms), milliseconds(o.vitfast_ms),
             f"{digits(o.ratio)}x", megabytes(o.timm_mb), megabytes(o.vitfast_mb),
             f"{o.error:.1e}" + ("" if o.within_budget else " OVER"), f"{o.budget:.1e}",
             MISSING if o.agreement is None else f"{o.agreement} of 5")
            for o in outcomes
        ],
    )  # fmt: skip
    usual, *others = dict.fromkeys(o.budget_from for o in outcomes)
    print_text(f"budget: {usual}")
    for text in others:
        judged = ", ".join(o.title for o in outcomes if o.budget_from == text)
        print_text(f"budget for {judged}: {text}")
    for o in outcomes:
        if o.labels:
            names = ", ".join(f"{label} {chance:.0%}" for label, chance in o.labels)
            print_text(f"{o.title} sees: {names}")
