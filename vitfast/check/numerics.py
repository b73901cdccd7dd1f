"""Every op and a small model of each family, judged against float64.

An op's error is compared with that of its reference in the same dtype, a swapped model's with
timm's; `vitfast.check.findings` keeps the result.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from vitfast.bench import modules, peers
from vitfast.bench.peers import Setting, first_line
from vitfast.check.findings import OK, OWN_KERNELS, REFUSED, WRONG, Finding
from vitfast.errors import BackendUnavailableError
from vitfast.ops import spec_of
from vitfast.ops.spec import OpSpec, Sample
from vitfast.report import UNTRUSTED
from vitfast.selftest.judge import plain_arithmetic
from vitfast.swap import swap
from vitfast.testing.cases import Case
from vitfast.testing.errors import ErrorReport

GPU_WORKERS = 4
"""Processes that check ops on a GPU: compiling the kernels takes longer than running them."""
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


def check_op(spec: OpSpec, sample: Sample, device: str = "cpu") -> Iterator[Finding]:
    """A finding for every dtype, pass and backend of one op on one sample.

    On a GPU in bfloat16, float16 and float32, on the CPU in the dtypes of the spec.
    """
    dtypes = spec.dtypes if device == "cpu" else (torch.bfloat16, torch.float16, torch.float32)
    for dtype in dtypes:
        case = Case(spec, sample, dtype)
        for passes in ("forward", "backward"):
            auto = _op_finding(case, passes, "auto", device)
            picked = spec.dispatcher.picked
            for backend in spec.dispatcher.backends:
                found = _op_finding(case, passes, backend, device)
                if backend == picked and found.state == OK != auto.state:
                    yield auto  # goes wrong only where nobody names the backend
                yield replace(found, picked=backend == picked)


def check_ops(
    cases: Sequence[tuple[OpSpec, Sample]], device: str, workers: int = 0
) -> Iterator[list[Finding]]:
    """What `check_op` finds for each case, a list a case, in their order.

    Args:
        workers: processes to share the work among, for a GPU, whose kernels are compiled on the
            CPU; 0 for none but this one. A case whose process dies is wrong in every backend that
            is vitfast's own.
    """
    if not workers:
        yield from ([*check_op(spec, sample, device)] for spec, sample in cases)
        return
    names = [(spec.name, sample.name) for spec, sample in cases]
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // workers)
    with concurrent.futures.ProcessPoolExecutor(
        workers, context, initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        futures = [pool.submit(_check_named, op, sample, device) for op, sample in names]
        for (op, sample), future in zip(names, futures, strict=True):
            try:
                yield future.result()
            except Exception as error:  # the process died, or the GPU with it
                reason = f"{type(error).__name__}: {first_line(error)}"
                yield [
                    Finding("op", op, sample, "", "", name, WRONG, reason=reason)
                    for name in sorted(OWN_KERNELS & spec_of(op).dispatcher.backends.keys())
                ]


def _check_named(op: str, sample: str, device: str) -> list[Finding]:
    """`check_op` in a worker, to which names can be sent and specs cannot."""
    spec = spec_of(op)
    with plain_arithmetic():
        found = [*check_op(spec, next(s for s in spec.samples if s.name == sample), device)]
    if device == "cuda":
        torch.cuda.synchronize()  # what a kernel broke shows here, not in the next case
    return found


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


def _op_finding(case: Case, passes: str, backend: str, device: str) -> Finding:
    """What one backend gives for one pass of a case."""
    blank = Finding("op", case.spec.name, case.sample.name, _name(case.dtype), passes, backend, OK)
    try:
        run = _forward if passes == "forward" else _backward
        return _judged(blank, run(case, backend, device))
    except BackendUnavailableError as error:
        return replace(blank, state=REFUSED, reason=first_line(error, last=True))
    except Exception as error:  # a crash of one backend is a finding, not the end of the check
        return replace(blank, state=WRONG, reason=f"{type(error).__name__}: {first_line(error)}")


def _forward(case: Case, backend: str, device: str) -> list[ErrorReport]:
    """Reports on the outputs, which are judged on the CPU."""
    outputs = case.outputs(case.call.map(lambda t: t.to(device)), backend=backend)
    return case.judge([t.cpu() for t in outputs])


def _backward(case: Case, backend: str, device: str) -> list[ErrorReport]:
    """Reports on the gradients of the arguments that models train, judged on the CPU."""
    call = case.call.map(lambda t: t.to(device))
    found = case.gradients(case.trained, call, backend=backend)
    return case.judge_gradients({n: None if t is None else t.cpu() for n, t in found.items()})


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
