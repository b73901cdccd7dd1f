"""What `vitfast check` runs: every op and a small model of each family, judged against float64."""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vitfast.bench import modules, peers
from vitfast.bench.peers import Setting, first_line
from vitfast.errors import BackendUnavailableError
from vitfast.ops import spec_of
from vitfast.ops.spec import OpSpec, Sample
from vitfast.testing.cases import Case
from vitfast.testing.errors import ErrorReport

OWN_KERNELS = {"triton", "cuda"}
"""Backends that are vitfast's own GPU code."""
OK, WRONG, REFUSED = "ok", "wrong", "cannot run"
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
DEPTH = {"depth": 2}
"""Blocks of a checked model: enough for one to feed another."""
DEPTHS = {"depths": (2, 2), "num_heads": (3, 6)}
STAGES = {"depths": (1, 1, 2, 1)}
MODEL_OPTIONS = {
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
"""Where `DEPTH` is not how a model is built with fewer blocks."""
MODEL_DTYPES = (torch.float32, torch.bfloat16)
MODEL_SIZES = {"naflexvit": (224, 224)}
"""Where a model's own size would only take longer."""


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Args:
        level: "op", "model", or "hardware": what only a GPU can show of an op's own kernels.
        name, case: the op and its sample (or check); the family and its model.
        passes: "forward" or "backward".
        backend: a backend's name; for models "swap".
        state: "ok", "wrong", or "cannot run" where a backend refuses this case.
        error_over_budget: the worst of all outputs or gradients; 1 is the limit.
        reason: what is wrong, or why it cannot run.
        picked: whether this backend is what backend="auto" takes here.
    """

    level: str
    name: str
    case: str
    dtype: str
    passes: str
    backend: str
    state: str
    error_over_budget: float | None = None
    reason: str = ""
    picked: bool = False


def op_cases(specs: Iterable[OpSpec]) -> list[tuple[OpSpec, Sample]]:
    return [(spec, s) for spec in specs for s in spec.samples if "check" in s.tags]


def check_op(spec: OpSpec, sample: Sample, device: str = "cpu") -> Iterator[Finding]:
    """Every dtype, backend and pass of one op on one sample."""
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
    """What `check_op` finds for each case, in their order.

    Args:
        workers: processes to share the work among, for a GPU, whose kernels are compiled on the
            CPU; 0 for none but this one.
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
    spec = spec_of(op)
    with plain_arithmetic():
        found = [*check_op(spec, next(s for s in spec.samples if s.name == sample), device)]
    if device == "cuda":
        torch.cuda.synchronize()  # what a kernel broke shows here, not in the next case
    return found


@contextlib.contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Within, torch's own GPU kernels neither round to TF32 nor add in half precision.

    They do by default in convolutions and some products, and their errors would hide ours.
    """
    matmul = torch.backends.cuda.matmul
    flags = [
        (torch.backends.cudnn, "allow_tf32"),
        (matmul, "allow_fp16_reduced_precision_reduction"),
        (matmul, "allow_bf16_reduced_precision_reduction"),
    ]
    before = [getattr(owner, name) for owner, name in flags]
    try:
        for owner, name in flags:
            setattr(owner, name, False)
        yield
    finally:
        for (owner, name), value in zip(flags, before, strict=True):
            setattr(owner, name, value)


def check_hardware(spec: OpSpec, seed: int) -> Iterator[Finding]:
    """What only a GPU can show of an op's own kernels: see `vitfast.check.hardware`."""
    from vitfast.check import hardware

    for backend in OWN_KERNELS & spec.dispatcher.backends.keys():
        for name, faults in hardware.all_checks(spec, backend, seed):
            yield Finding(
                "hardware", spec.name, name, "", "", backend, WRONG if faults else OK,
                reason="; ".join(faults[:3]),
            )  # fmt: skip


def verified(found: Iterable[Finding], left_out: Sequence[str] = ()) -> list[str]:
    """Ops whose own GPU kernels ran here and were never wrong, in no check left out either."""
    ran: dict[str, bool] = {name.split(":")[0]: False for name in left_out}
    for f in found:
        if f.level != "model" and f.backend in OWN_KERNELS and f.state != REFUSED:
            ran[f.name] = ran.get(f.name, True) and f.state == OK
    return sorted(op for op, right in ran.items() if right)


def check_model(family: str, dtype: torch.dtype, device: str = "cpu") -> Iterator[Finding]:
    """A swapped model beside timm's own: outputs; in float32 gradients of a training step too."""
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
    blank = Finding("op", case.spec.name, case.sample.name, _name(case.dtype), passes, backend, OK)
    try:
        run = _forward if passes == "forward" else _backward
        return _judged(blank, run(case, backend, device))
    except BackendUnavailableError as error:
        return replace(blank, state=REFUSED, reason=first_line(error, last=True))
    except Exception as error:  # a crash of one backend is a finding, not the end of the check
        return replace(blank, state=WRONG, reason=f"{type(error).__name__}: {first_line(error)}")


def _forward(case: Case, backend: str, device: str) -> list[ErrorReport]:
    outputs = case.outputs(case.call.map(lambda t: t.to(device)), backend=backend)
    return case.judge([t.cpu() for t in outputs])


def _backward(case: Case, backend: str, device: str) -> list[ErrorReport]:
    call = case.call.map(lambda t: t.to(device))
    found = case.gradients(case.trained, call, backend=backend)
    return case.judge_gradients({n: None if t is None else t.cpu() for n, t in found.items()})


def _model_finding(blank: Finding, setting: Setting) -> Finding:
    from vitfast.swap import swap

    size = MODEL_SIZES.get(blank.name)
    options = MODEL_OPTIONS.get(blank.name, DEPTH)
    case = modules.model_case(blank.case, size, 1, setting, **options)
    judge = modules.Judge(case)
    fast = peers.sharing_copy(case.module)
    report = swap(fast)
    if not report.counts["blocks_swapped"]:
        return replace(blank, state=WRONG, reason="no block was swapped")
    judge("vitfast", peers.eager(fast, case.inputs, setting)())
    worst = judge.worst["vitfast"]
    if worst <= 1:
        return replace(blank, error_over_budget=worst)
    return replace(blank, state=WRONG, error_over_budget=worst, reason="error over budget")


def _judged(blank: Finding, reports: Iterable[ErrorReport]) -> Finding:
    reports = list(reports)
    wrong = [problem for report in reports for problem in report.problems]
    worst = max((r.error_over_budget for r in reports), default=0.0)
    if wrong:
        return replace(blank, state=WRONG, error_over_budget=worst, reason=wrong[0])
    return replace(blank, error_over_budget=worst)


def op_table(found: Iterable[Finding]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """One line an op and backend: the worst error over budget by dtype and pass."""
    return _table(
        [f for f in found if f.level == "op"],
        ("op", "backend"),
        lambda f: (f.name, f.backend),
    )


def model_table(found: Iterable[Finding]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """One line a family."""
    return _table(
        [f for f in found if f.level == "model"],
        ("family", "model"),
        lambda f: (f.name, f.case),
    )


def _table(
    found: list[Finding], names: tuple[str, ...], key: Callable[[Finding], tuple[str, ...]]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    columns = list(dict.fromkeys((f.dtype, f.passes) for f in found))
    lines: list[tuple[str, ...]] = []
    for group in dict.fromkeys(map(key, found)):
        mine = [f for f in found if key(f) == group]
        ran = [f for f in mine if f.state != REFUSED]
        worst = [_worst(f for f in ran if (f.dtype, f.passes) == column) for column in columns]
        state = "wrong" if any(f.state == WRONG for f in mine) else "ok" if ran else "cannot run"
        picked = sum(f.picked for f in mine)
        share = f"{picked} of {len(mine)}" if picked else ""
        lines.append((*group, *worst, state, *([share] if names[0] == "op" else [])))
    header = (*names, *(f"{dtype} {passes}" for dtype, passes in columns), "state")
    return (*header, "picked") if names[0] == "op" else header, lines


def _worst(found: Iterable[Finding]) -> str:
    errors = [math.inf if f.error_over_budget is None else f.error_over_budget for f in found]
    return f"{max(errors):.2f}" if errors else "-"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def as_json(found: Iterable[Finding]) -> list[dict[str, Any]]:
    return [vars(f) for f in found]
