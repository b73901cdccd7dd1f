"""Every op and a small model of each family, judged against float64.

An op's error is compared with that of its reference in the same dtype, a swapped model's with
timm's; `vitfast.check.findings` keeps the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from vitfast.bench import modules, peers
from vitfast.bench.peers import Setting
from vitfast.check.findings import OK, REFUSED, WRONG, Finding
from vitfast.errors import BackendUnavailableError, first_line
from vitfast.ops.spec import OpSpec, Sample
from vitfast.report import UNTRUSTED
from vitfast.swap import swap
from vitfast.testing.cases import Case
from vitfast.testing.errors import ErrorReport

MODELS = {
    "vit": "vit_tiny_patch16_224",
    "deit": "deit_tiny_distilled_patch16_224",
    "eva02": "eva02_tiny_patch14_224",
    "dinov3": "vit_small_patch16_dinov3",
    "naflexvit": "naflexvit_base_patch16_gap",
    "beit": "beit_base_patch16_224",
    "relpos": "vit_relpos_small_patch16_224",
    "hybrid": "vit_tiny_r_s16_p8_224",
    "hybrid_r26": "vit_small_r26_s32_224",
    "swin": "swin_tiny_patch4_window7_224",
    "swin_v2": "swinv2_tiny_window8_256",
    "swin_v2_cr": "swinv2_cr_tiny_224",
    "convnext": "convnext_tiny",
    "convnext_v2": "convnextv2_tiny",
    "edgenext": "edgenext_x_small",
    "rdnet": "rdnet_tiny",
    "inception_next": "inception_next_tiny",
    "metaformer": "caformer_s18",
}
"""Family -> the timm model that is checked, with random weights."""
DEPTH = {"depth": 2}
"""Blocks of a checked model: enough for one to feed another."""
DEPTHS = {"depths": (2, 2), "num_heads": (3, 6)}
STAGES = {"depths": (1, 1, 2, 1)}
MODEL_OPTIONS: dict[str, dict[str, Any]] = {
    "swin": DEPTHS,
    "swin_v2": DEPTHS,
    "swin_v2_cr": DEPTHS,
    "convnext": STAGES,
    "convnext_v2": STAGES,
    "edgenext": {"depths": (2, 2, 2, 2)},
    "rdnet": {"num_blocks_list": (1,) * 7},
    "inception_next": STAGES,
    "metaformer": {},  # its functions take no depths
}
"""Family -> timm's arguments for few blocks, where these are not `DEPTH`."""
MODEL_DTYPES = (torch.float32, torch.bfloat16)
MODEL_SIZES = {"naflexvit": (224, 224)}
"""Family -> (height, width), where the model's own size would only take longer."""


def op_cases(specs: Iterable[OpSpec]) -> list[tuple[OpSpec, Sample]]:
    """The samples of these ops that `vitfast check` runs."""
    return [(spec, s) for spec in specs for s in spec.samples if "check" in s.tags]


def check_op(spec: OpSpec, sample: Sample) -> Iterator[Finding]:
    """A finding for every dtype of the spec, pass and backend of one op on one sample."""
    for dtype in spec.dtypes:
        case = Case(spec, sample, dtype)
        for passes in ("forward", "backward"):
            auto = _op_finding(case, passes, "auto")
            picked = spec.dispatcher.picked
            for backend in spec.dispatcher.backends:
                found = _op_finding(case, passes, backend)
                if backend == picked and found.state == OK != auto.state:
                    yield auto  # goes wrong only where nobody names the backend
                yield replace(found, picked=backend == picked)


def check_model(family: str, dtype: torch.dtype, device: str = "cpu") -> Iterator[Finding]:
    """Findings of a swapped model: its outputs, and in float32 a training step's gradients too."""
    name = MODELS[family]
    for train in (False, True) if dtype == torch.float32 else (False,):
        setting = Setting(dtype, device, train)
        blank = Finding(
            "model", family, name, _name(dtype), "backward" if train else "forward", "swap", OK
        )
        try:
            yield _model_finding(blank, setting)
        except Exception as error:
            yield replace(blank, state=WRONG, reason=f"{type(error).__name__}: {first_line(error)}")


def _op_finding(case: Case, passes: str, backend: str) -> Finding:
    """What one backend gives for one pass of a case."""
    blank = Finding("op", case.spec.name, case.sample.name, _name(case.dtype), passes, backend, OK)
    try:
        run = _forward if passes == "forward" else _backward
        return _judged(blank, run(case, backend))
    except BackendUnavailableError as error:
        return replace(blank, state=REFUSED, reason=first_line(error, last=True))
    except Exception as error:  # a crash of one backend is a finding, not the end of the check
        return replace(blank, state=WRONG, reason=f"{type(error).__name__}: {first_line(error)}")


def _forward(case: Case, backend: str) -> list[ErrorReport]:
    """Reports on the outputs."""
    return case.judge(case.outputs(backend=backend))


def _backward(case: Case, backend: str) -> list[ErrorReport]:
    """Reports on the gradients of the arguments that models train."""
    return case.judge_gradients(case.gradients(case.trained, backend=backend))


def _model_finding(blank: Finding, setting: Setting) -> Finding:
    """`blank`, which names the family and its model, with what swapping that model gives."""
    size = MODEL_SIZES.get(blank.name)
    options = MODEL_OPTIONS.get(blank.name, DEPTH)
    case = modules.model_case(blank.case, size, 1, setting, **options)
    judge = modules.Judge(case)
    fast = peers.sharing_copy(case.module)
    report = swap(fast)
    if not report.counts["blocks_swapped"]:
        return replace(blank, state=WRONG, reason="no block was swapped")
    notes = [entry.note for entry in report.swapped if entry.role == "block"]
    if all(note.startswith(UNTRUSTED) for note in notes):  # there is nothing of ours to judge
        return replace(blank, state=REFUSED, reason=notes[0])
    judge("vitfast", peers.eager(fast, case.inputs, setting)())
    worst = judge.worst["vitfast"]
    if worst <= 1:
        return replace(blank, error_over_budget=worst)
    return replace(blank, state=WRONG, error_over_budget=worst, reason="error over budget")


def _judged(blank: Finding, reports: Iterable[ErrorReport]) -> Finding:
    """`blank` with the worst error of these reports, and the first problem where there is one."""
    reports = list(reports)
    wrong = [problem for report in reports for problem in report.problems]
    worst = max((r.error_over_budget for r in reports), default=0.0)
    if wrong:
        return replace(blank, state=WRONG, error_over_budget=worst, reason=wrong[0])
    return replace(blank, error_over_budget=worst)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
