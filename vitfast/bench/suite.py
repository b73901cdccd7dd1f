"""The standard set of measurements of a machine: what `vitfast bench` times without a level.

Most important first, since it stops when its time is over: whole models, the ops of a ViT-B at
their real shapes, attention over a 4K frame's 32,400 tokens, training, Swin.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from vitfast.bench import modules, ops
from vitfast.bench.child import add_model_memory
from vitfast.bench.memory_floor import memory_floor_mb
from vitfast.bench.peers import Setting
from vitfast.bench.progress import Progress, of_part
from vitfast.bench.record import Row
from vitfast.errors import InputValueError, first_line

Measure = Callable[[Progress], Row]
"""Measures one case, and tells how far it is."""
MINUTES = {"cpu": 7.0, "cuda": 5.5}
"""Nothing starts after these. A model on a GPU takes up to two, most of that for torch.compile."""


@dataclass(frozen=True)
class Part:
    """One line of the set: a model at a level, or ops on samples of their specs.

    Args:
        level: "ops", "blocks" or "models".
        model: a timm model; None for ops on the samples of their specs.
        img_size: (height, width); None for the model's own.
        ops: the ops that are timed at level "ops"; all where it is empty.
        case: the only sample that is timed, without a model.
    """

    level: str
    model: str | None = "vit_base_patch16_224"
    img_size: tuple[int, int] | None = None
    batch: int = 1
    train: bool = False
    ops: tuple[str, ...] = ()
    case: str | None = None

    @property
    def title(self) -> str:
        """As in notes on what was left out: "ops attention vit_large_4k train"."""
        size = "" if self.img_size is None else f" {self.img_size[0]}x{self.img_size[1]}"
        names = " ".join((*self.ops, self.case or ""))
        what = f"{self.model}{size} batch {self.batch}" if self.model else names
        return f"{self.level} {what} {'train' if self.train else 'infer'}"


UHD = (2160, 3840)
"""(height, width) of a 4K frame."""
PARTS = {
    "cuda": (
        Part("models", batch=256),
        Part("models", "vit_large_patch16_224", UHD),
        Part("ops", None, ops=("attention",), case="vit_large_4k"),
        Part("ops", None, ops=("attention",), case="vit_large_4k", train=True),
        Part("ops", batch=64),
        Part("ops", batch=64, train=True),
        Part("models", batch=64, train=True),
        Part("models", "swin_base_patch4_window7_224", batch=128),
        Part("models", "swinv2_base_window16_256", batch=128),
        Part("ops", "swin_base_patch4_window7_224", batch=128),
        Part("models", "swin_base_patch4_window7_224", batch=64, train=True),
        Part("models", "convnext_base", batch=128),
        Part("models", "convnextv2_base", batch=128),
        Part("ops", "convnext_base", batch=128),
        Part("models", "vit_base_r50_s16_224", batch=128),
        Part("blocks", "vit_large_patch16_224", UHD, train=True),
    ),
    "cpu": (
        Part("models"),
        Part("models", "swin_tiny_patch4_window7_224"),
        Part("models", "convnext_tiny"),
        Part("models", "vit_small_r26_s32_224"),
        Part("ops"),
        Part("blocks", train=True),
        Part("ops", train=True),
        Part("blocks", img_size=(1024, 1024)),
    ),
}
"""Device -> the standard set, most important first."""


@dataclass(frozen=True)
class Options:
    """Of a run.

    Args:
        wanted: level -> peers by name.
        seconds: level -> timed work a case.
        with_memory: whether peak memory is measured too.
    """

    wanted: Mapping[str, Sequence[str]]
    seconds: Mapping[str, float]
    with_memory: bool = True


def cases(part: Part, setting: Setting, options: Options) -> list[Measure]:
    """A `Measure` for each case of a part.

    Raises:
        InputValueError: no such model or op, a size that a model cannot take, or no case.
    """
    setting = replace(setting, train=part.train)
    if part.level != "ops":
        return [functools.partial(_model, part, setting, options)]
    specs = ops.specs(part.ops)
    if part.model is None:
        found = ops.real_cases(specs, setting, part.case)
    else:
        found = ops.model_cases(specs, part.model, part.img_size, part.batch, setting)
    if not found:
        wanted = ", ".join(part.ops or ["any op"])
        what = f"sample {part.case!r}" if part.case else part.model or "sample"
        raise InputValueError(f"nothing to time: no {setting.label} call of {wanted} in {what}")
    return [functools.partial(_op, case, options) for case in found]


def _op(case: ops.OpCase, options: Options, progress: Progress) -> Row:
    """The row of one op on one sample."""
    return ops.measure(
        case, options.wanted["ops"], seconds=options.seconds["ops"],
        with_memory=options.with_memory, progress=progress,
    )  # fmt: skip


def _model(part: Part, setting: Setting, options: Options, progress: Progress) -> Row:
    """The row of a model or of its first block; of a model on the CPU with each peer's memory."""
    build = modules.block_case if part.level == "blocks" else modules.model_case

    def say(text: str, share: float) -> None:
        progress(f"{part.model}: {text}", share)

    say("building", 0.0)
    case = build(part.model or "", part.img_size, part.batch, setting)
    row = modules.measure(
        case, options.wanted[part.level],
        seconds=options.seconds[part.level], with_memory=options.with_memory, progress=say,
    )  # fmt: skip
    if part.level == "models":
        row.memory_floor_mb = memory_floor_mb(case.module, case.inputs, setting)
    del case  # the processes that measure memory come next, and need room for their own
    if part.level == "models" and options.with_memory and setting.device == "cpu":
        arguments = {
            "model": part.model, "img_size": part.img_size, "batch": part.batch,
            "dtype": row.dtype, "device": setting.device, "train": setting.train,
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        add_model_memory(row, arguments, say)
    return row


def run(
    parts: Sequence[Part], setting: Setting, options: Options, minutes: float,
    progress: Progress, clock: Callable[[], float] = time.monotonic,
    keep: Callable[[list[Row], list[str]], None] = lambda rows, notes: None,
) -> tuple[list[Row], list[str]]:  # fmt: skip
    """Measure parts one after another.

    Args:
        minutes: nothing starts after these; infinite for no limit.
        progress: every part counts 1.
        clock: gives seconds; for tests.
        keep: gets both after every row, so that an interrupted run keeps its work.

    Returns:
        Rows, and a sentence for each thing that was left out, for want of time or by an error.
    """
    rows: list[Row] = []
    notes: list[str] = []
    end = clock() + 60 * minutes

    for i, part in enumerate(parts):
        try:
            found = cases(part, setting, options) if clock() < end else []
            for j, measure in enumerate(found):
                if clock() > end:
                    notes.append(f"{part.title}: {len(found) - j} cases left out, out of time")
                    break
                rows.append(measure(of_part(progress, i, j, len(found))))
                keep(rows, notes)
            if not found:
                notes.append(f"{part.title}: left out, out of time")
        except Exception as error:  # too little memory, no kernel for this card: on to the next
            notes.append(f"{part.title}: {type(error).__name__}: {first_line(error)}")
    return rows, notes
