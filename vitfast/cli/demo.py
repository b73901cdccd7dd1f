"""`vitfast demo`: real models on a real photograph, timm beside vitfast, and a report."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vitfast.cli.device import chosen_device
from vitfast.errors import InputValueError, first_line

if TYPE_CHECKING:
    from vitfast.bench.progress import Progress
    from vitfast.demo.page import Report
    from vitfast.demo.showcase import Failure, Outcome, Showcase

T = TypeVar("T")

REPORT = "vitfast-demo.html"
DTYPES = {"float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16"}
SECTIONS = ("speed", "large", "attention", "duplicates")
QUICK_SECONDS = 2.0
"""For all models together, in place of the demo's usual time."""
QUICK = {
    "models": "test_vit@64,test_vit2@64",
    "large_model": "test_convnext",
    "large_size": "270x480",
    "attention_model": "test_vit",
    "attention_size": "64x112",
    "duplicates_model": "test_vit",
}
"""Options that --quick sets where they were not given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--image", metavar="PATH", help="a photograph; some are built in")
    add("--pretrained", action="store_true", help="trained weights (from the network or cache)")
    add("--models", metavar="NAME[@SIZE],...", help="timm models; ViT-B/16 at 224 and 1024, "
        "ConvNeXt-T, DINOv2 and DINOv3 ViT-S by default")  # fmt: skip
    add("--sections", metavar="NAME,...", default=",".join(SECTIONS),
        help=f"of the report; all by default: {', '.join(SECTIONS)}")  # fmt: skip
    add("--large-model", metavar="NAME", help="for the large photograph; convnext_tiny by default")
    add("--large-size", metavar="HxW", help="of the large photograph; 2160x3840 by default")
    add("--attention-model", metavar="NAME", help="a ViT; DINOv2 ViT-S by default")
    add("--attention-size", metavar="HxW", help="of the picture attended to; 532x952 by default")
    add("--duplicates-model", metavar="NAME", help="of vectors; DINOv2 ViT-S by default")
    add("--quick", action="store_true", help="models and sizes of seconds, to see whether it runs")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="bf16: under autocast")
    add("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    add("--output", metavar="PATH", default=REPORT, help=f"file or folder; {REPORT} by default")


def run(args: argparse.Namespace) -> int:
    import torch

    from vitfast.bench import machine, peers, record
    from vitfast.bench.progress import of_part, progress_bar
    from vitfast.demo import attention, duplicates, large, page, photo, showcase
    from vitfast.loading import check_name

    if args.quick:
        for name, value in QUICK.items():
            setattr(args, name, getattr(args, name) or value)
    target = Path(args.output)
    target = record.check_writable(target / REPORT if target.is_dir() else target)
    sections = _sections(args.sections)
    models = showcase.parse_models(args.models) if "speed" in sections else []
    large_size = _size("--large-size", args.large_size, large.SIZE)
    attention_size = _size("--attention-size", args.attention_size, attention.SIZE)
    names = [args.large_model or large.MODEL, args.attention_model or attention.MODEL,
             args.duplicates_model or duplicates.MODEL]  # fmt: skip
    for name in names:
        check_name(name)
    picture = photo.load(args.image)
    packaged = photo.packaged()
    # Landscapes are first among these: there is more to see of one that is cropped to 16:9.
    wide = picture if args.image or not packaged else packaged[0]
    device = chosen_device(args.device)
    setting = peers.Setting(getattr(torch, DTYPES[args.dtype]), device)
    report = page.Report([], machine.describe(device), picture, args.pretrained, _now(), _command())
    with progress_bar(2 * len(models) + len(sections)) as show:
        if models:
            show("warming up", 0.0)
            seconds = QUICK_SECONDS if args.quick else showcase.SECONDS_IN_ALL
            stage = showcase.Showcase(
                picture.image, setting, pretrained=args.pretrained, seconds=seconds
            )
            stage.warm_up()
            report.outcomes, report.failures = _speed(stage, models, show)
        done = 2 * len(models)
        if "large" in sections:
            scale = large.Scale(names[0], large_size)
            if args.quick:
                scale = scale._replace(tile=128, budget=0.1)
            report.large = _section(
                lambda: large.run(wide, scale, setting, args.pretrained, of_part(show, done))
            )
        if "attention" in sections:
            show("what a model attends to", done + 1)
            report.attention = _section(
                lambda: attention.run(wide, names[1], attention_size, setting, args.pretrained)
            )
        if "duplicates" in sections:
            show("near-duplicates", done + 2)
            size = (64, 64) if args.quick else duplicates.SIZE
            report.duplicates = _section(
                lambda: duplicates.run(packaged, names[2], size, device, args.pretrained)
            )
    _show(report)
    record.write_text(target, page.render(report))
    print(f"report: {target}")
    later = (report.large, report.attention, report.duplicates)
    right = all(outcome.within_budget for outcome in report.outcomes)
    return int(not right or bool(report.failures) or any(isinstance(x, str) for x in later))


def _speed(
    stage: Showcase, models: Sequence[tuple[str, tuple[int, int] | None]], show: Progress
) -> tuple[list[Outcome], list[Failure]]:
    """Time all models, then measure their memory; one that fails leaves the others alone."""
    from vitfast.bench.progress import of_part
    from vitfast.demo.showcase import Failure

    outcomes, failures = [], []
    for i, (name, size) in enumerate(models):
        try:
            outcomes.append(stage.run(name, size, of_part(show, i)))
        except Exception as error:  # whatever a model raises, the report is of the others
            title = name if size is None else f"{name} @ {size[0]}x{size[1]}"
            failures.append(Failure(title, first_line(error)))
    for i, outcome in enumerate(outcomes):
        stage.measure_memory(outcome, of_part(show, len(models) + i))
    return outcomes, failures


def _section(make: Callable[[], T]) -> T | str:
    """What a section shows, or why it failed."""
    try:
        return make()
    except Exception as error:  # as in `_speed`
        return first_line(error)


def _sections(text: str) -> list[str]:
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in wanted if part not in SECTIONS]
    if unknown or not wanted:
        raise InputValueError(f"--sections {text}: expected some of {', '.join(SECTIONS)}")
    return wanted


def _size(option: str, text: str | None, usual: tuple[int, int]) -> tuple[int, int]:
    from vitfast.bench import zoo

    if text is None:
        return usual
    try:
        return zoo.parse_img_size(text)
    except InputValueError:
        raise InputValueError(f"{option} {text}: expected a size such as 2160x3840") from None


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _command() -> str:
    return shlex.join(["vitfast", *sys.argv[1:]])


def _show(report: Report) -> None:
    """Print what was swapped, the times beside timm's, how errors were judged, and a sentence of
    each further section."""
    from vitfast.cli.table import print_text
    from vitfast.demo.page import where
    from vitfast.demo.showcase import verdict

    print_text(where(report.machine))
    if report.outcomes:
        print_text(f"photograph: {report.photo.credit if report.photo else 'none'}")
        print()
        _show_outcomes(report.outcomes)
    for failure in report.failures:
        print_text(f"{failure.title} failed: {failure.reason}")
    if report.outcomes or report.failures:
        print_text(verdict(report.outcomes, report.failures))
    named = {"large photograph": report.large, "attention": report.attention,
             "near-duplicates": report.duplicates}  # fmt: skip
    for name, section in named.items():
        if isinstance(section, str):
            print_text(f"{name} failed: {section}")
        elif section is not None:
            print_text(section.sentence())


def _show_outcomes(outcomes: Sequence[Outcome]) -> None:
    from vitfast.bench.report import MISSING, digits, megabytes, milliseconds
    from vitfast.cli.table import print_table, print_text

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
    for text in dict.fromkeys(o.memory_reason for o in outcomes if o.memory_reason):
        print_text(f"MB {MISSING}: {text}")
    featured = [o.title for o in outcomes if o.agreement is None]
    if featured:
        print_text(f"top-5 {MISSING}: features, no classes: {', '.join(featured)}")
    usual, *others = dict.fromkeys(o.budget_from for o in outcomes)
    print_text(f"budget: {usual}")
    for text in others:
        judged = ", ".join(o.title for o in outcomes if o.budget_from == text)
        print_text(f"budget for {judged}: {text}")
    for o in outcomes:
        if o.labels:
            names = ", ".join(f"{label} {chance:.0%}" for label, chance in o.labels)
            print_text(f"{o.title} sees: {names}")
