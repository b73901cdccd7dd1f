"""`vitfast prove`: everything that hardware can tell of vitfast's GPU kernels, in one short run.

Stages, in the order of what matters most if the machine is lent for minutes: the self-test of every
op in every dtype and pass, which compiles all kernels on all cores; what only hardware shows
(determinism, streams, graphs, no memory, 2^31 elements); kernels beside the vendors'; whole models
beside timm's. Every item runs in a worker that is replaced when it breaks or hangs, and every
answer is written at once: a run that is ended has lost only what was in progress.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vitfast.bench import machine, record
from vitfast.check.hardware import checks_of
from vitfast.ops import spec_of, specs
from vitfast.runtime import launches, verdicts
from vitfast.runtime.verdicts import PASSES, RIGHT, WRONG, Question, Verdicts
from vitfast.selftest import session, workers
from vitfast.selftest.problems import Problem, most_flops, samples

DTYPES = ("bfloat16", "float16", "float32")
COMMAND = workers.command_of("vitfast.check.prove_worker")
SHARES = {"selftest": 0.42, "hardware": 0.16, "kernels": 0.14, "models": 0.28}
"""Of the time, by stage; what one leaves over the next have."""
TASK_SECONDS = 60.0
MODEL_SECONDS = 120.0
"""The longest that one item may take, compiling included."""
GAINING = (
    "window_attention", "dwconv_norm", "add_norm", "norm_add", "layer_norm", "patch_merge", "grn",
    "group_norm_act", "attention", "residual_add", "linear_act", "patch_embed",
)  # fmt: skip
"""Ops in the order in which they are timed: what should gain most comes first."""


@dataclass(frozen=True)
class Model:
    """A model that is timed beside timm's.

    Args:
        size: height and width; None for the model's own.
        peers: contenders besides vitfast.
    """

    name: str
    batch: int
    size: tuple[int, int] | None = None
    train: bool = False
    peers: tuple[str, ...] = ("eager",)
    options: dict[str, Any] = field(default_factory=dict)


MODELS = (
    Model("swin_base_patch4_window7_224", 128),
    Model("convnext_base", 128),
    Model("vit_base_patch16_224", 256, peers=("eager", "compile")),
    Model("swinv2_base_window8_256", 128),
    Model("vit_large_patch16_224", 1, (2160, 3840)),
    Model("swin_base_patch4_window7_224", 64, train=True),
    Model("convnext_base", 64, train=True),
    Model("vit_base_patch16_224", 128, train=True),
)
TINY = (
    Model("vit_tiny_patch16_224", 1, (32, 32), options={"depth": 1, "embed_dim": 48,
                                                        "num_heads": 3}),
)  # fmt: skip
"""For Triton's interpreter."""


@dataclass(frozen=True)
class Item:
    """One thing to find out: its stage, what it is called, and the task of a worker."""

    stage: str
    name: str
    task: dict[str, Any]
    question: Question | None = None

    @property
    def op(self) -> str:
        """The op that it is about; "" for a model."""
        found: str = self.question.op if self.question else self.task.get("op", "")
        return found


def items(device: torch.device, ops: Sequence[str], stage: str) -> list[Item]:
    """The items of a stage, what matters most first."""
    make = {
        "selftest": _selftest, "hardware": _hardware, "kernels": _kernels, "models": _models
    }[stage]  # fmt: skip
    return list(make(device, ops))


def _task(device: torch.device, do: str, **what: Any) -> dict[str, Any]:
    return {"do": do, "device": str(device), **what}


def _dtypes(device: torch.device) -> tuple[str, ...]:
    return DTYPES if device.type == "cuda" else ("float32",)


def _selftest(device: torch.device, ops: Sequence[str]) -> Iterator[Item]:
    """Every op in every dtype and pass, as `vitfast.prepare` would."""
    for dtype in _dtypes(device):
        for op in ops:
            for problem in samples(spec_of(op), dtype, most_flops(device)):
                for passes in PASSES:
                    task = _task(device, "judge", problem=problem.to_json(), passes=passes)
                    name = f"{op} {problem.name} {dtype} {passes}"
                    yield Item("selftest", name, task, Question(op, dtype, passes))


def _hardware(device: torch.device, ops: Sequence[str]) -> Iterator[Item]:
    """Some checks of each op before more of any."""
    checks = {op: list(checks_of(spec_of(op), "triton", device.type)) for op in ops}
    for i in range(max(map(len, checks.values()), default=0)):
        for op, names in checks.items():
            if i < len(names):
                task = _task(device, "check", op=op, name=names[i])
                yield Item("hardware", f"{op} {names[i]}", task)


def _kernels(device: torch.device, ops: Sequence[str]) -> Iterator[Item]:
    """At the sizes of real models, beside the vendors' kernels."""
    on_gpu, dtype = device.type == "cuda", _dtypes(device)[0]
    tag, most = ("real", 6) if on_gpu else ("small", 1)
    for op in sorted(ops, key=lambda op: GAINING.index(op) if op in GAINING else len(GAINING)):
        few = [s for s in spec_of(op).samples if tag in s.tags and "empty" not in s.tags]
        for sample in few[:most]:
            problem = Problem(op, dtype, {}, sample=sample.name).to_json()
            for passes in PASSES:
                task = _task(device, "time", problem=problem, passes=passes, by_vendor=True)
                name = f"{op} {sample.name} {dtype} {passes}"
                yield Item("kernels", name, task, Question(op, dtype, passes))


def _models(device: torch.device, ops: Sequence[str]) -> Iterator[Item]:
    on_gpu = device.type == "cuda"
    for model in MODELS if on_gpu else TINY:
        task = _task(
            device, "model", model=model.name, size=model.size, batch=model.batch,
            dtype=_dtypes(device)[0], train=model.train, peers=list(model.peers),
            seconds=4.0 if on_gpu else 0.1, options=model.options,
        )  # fmt: skip
        kind = "train" if model.train else "infer"
        at = "" if model.size is None else f" @ {model.size[0]}x{model.size[1]}"
        yield Item("models", f"{model.name}{at} batch {model.batch} {kind}", task)


class Record:
    """The file of a run, written whole after every item."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.path = folder / "prove.json"
        self.facts = facts
        self.items: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self.is_over = False
        self.write()

    def add(self, item: Item, reply: dict[str, Any], seconds: float) -> None:
        """Keep an answer, which came so many seconds after the beginning."""
        kept = {
            name: value
            for name, value in reply.items()
            if value is not None and value is not False and value != ""
        }
        what = {"stage": item.stage, "name": item.name, "op": item.op, "at": round(seconds, 1)}
        if item.question is not None:
            what |= {"dtype": item.question.dtype, "passes": item.question.passes}
        self.items.append({**what, **kept})
        self.write()

    def write(self) -> None:
        record.write_json(self.path, record.document(
            "prove", self.facts, finished=self.is_over, items=self.items, left_out=self.left_out
        ))  # fmt: skip


def prove(
    device: torch.device, folder: Path, ops: Sequence[str], seconds: float,
    say: Callable[[str], None],
) -> Record:  # fmt: skip
    """Run all stages within `seconds`, and keep what they find.

    Verdicts go to this user's cache, so that the models run what was right; they, the record and
    the launch tables that follow from the timings lie in the folder: `prove.json`, and
    `<architecture>.json` as the package carries it.
    """
    begin = time.monotonic()
    kept = Record(folder, machine.describe(str(device) if device.type == "cuda" else "cpu"))
    share_left = 1.0
    for stage, share in SHARES.items():
        left = begin + seconds - time.monotonic()
        until = time.monotonic() + max(0.0, left) * share / share_left
        share_left -= share
        todo = items(device, ops, stage)
        say(f"{stage}: {len(todo)} items, {max(0.0, until - time.monotonic()):.0f} s at most")
        replies = _run(todo, until, kept, begin, say)
        if stage == "selftest":
            verdicts.keep(device, _verdicts(todo, replies))
        if stage == "kernels" and device.type == "cuda":
            _keep_times(device, todo, replies)
        _write_table(device, folder)
    kept.is_over = True
    kept.write()
    return kept


def _run(
    todo: Sequence[Item], until: float, kept: Record, begin: float, say: Callable[[str], None]
) -> dict[int, dict[str, Any]]:
    """The answers to a stage's items, as far as there was time."""
    stage = todo[0].stage if todo else ""
    count = 1 if stage in ("kernels", "models") else min(8, os.cpu_count() or 1)
    longest = MODEL_SECONDS if stage == "models" else TASK_SECONDS
    environment = session.ENVIRONMENT
    if stage == "models":
        environment = environment | {"VITFAST_TRUST": "cached"}
    found: dict[int, dict[str, Any]] = {}
    answers = workers.answers(
        [item.task for item in todo], count, longest, command=COMMAND, environment=environment,
        until=until,
    )  # fmt: skip
    for number, reply in answers:
        if reply.get("state") == workers.LEFT_OUT:
            kept.left_out.append(f"{stage}: {todo[number].name}")
            continue
        found[number] = reply
        kept.add(todo[number], reply, time.monotonic() - begin)
        if reply.get("state") not in (None, RIGHT, "refused"):
            say(f"{todo[number].name}: {reply['state']}: {reply.get('reason', '')}")
    kept.write()
    return found


def _verdicts(todo: Sequence[Item], replies: dict[int, dict[str, Any]]) -> Verdicts:
    """Of the questions all of whose items were answered; what went wrong counts at once."""
    by_question: dict[Question, list[tuple[Problem, dict[str, Any] | None]]] = {}
    for number, item in enumerate(todo):
        assert item.question is not None  # every item of this stage has one
        problem = Problem.from_json(item.task["problem"])
        by_question.setdefault(item.question, []).append((problem, replies.get(number)))
    found: Verdicts = {}
    for question, answers in by_question.items():
        given = [(problem, reply) for problem, reply in answers if reply is not None]
        verdict = session.verdict_of(given, ())
        whole = len(given) == len(answers)
        if verdict is not None and (whole or verdict.state != RIGHT) and given:
            found[question] = verdict
    return found


def _keep_times(
    device: torch.device, todo: Sequence[Item], replies: dict[int, dict[str, Any]]
) -> None:
    """Verdicts with speeds, and who is fastest at which size, from the times of kernels."""
    times: dict[Question, list[dict[str, Any]]] = {}
    for number, reply in replies.items():
        question = todo[number].question
        if reply.get("seconds") and question is not None:
            times.setdefault(question, []).append(reply)
    known = verdicts.known(device)
    verdicts.keep(device, session.with_times(device, known, times))


def _write_table(device: torch.device, folder: Path) -> None:
    """What the package may carry of this machine: its verdicts and launch table."""
    arch = launches.arch_of(device).name
    document = verdicts.as_document(device, verdicts.known(device))
    table = {"kernels": launches.table(arch)["kernels"], "verdicts": document}
    record.write_json(folder / f"{arch}.json", table)


def summary(kept: Record) -> list[tuple[str, str, str, str]]:
    """A line a stage: items answered, those that are not right, those left out."""
    lines = []
    for stage in SHARES:
        mine = [item for item in kept.items if item["stage"] == stage]
        wrong = [i for i in mine if i.get("state", RIGHT) not in (RIGHT, "refused")]
        left = sum(text.startswith(f"{stage}:") for text in kept.left_out)
        lines.append((stage, str(len(mine)), str(len(wrong)), str(left)))
    return lines


def ratios(kept: Record) -> list[tuple[str, ...]]:
    """(what, backend or peer, its time over vitfast's) of every timing."""
    lines: list[tuple[str, ...]] = []
    for item in kept.items:
        seconds = item.get("seconds", {})
        for name, taken in seconds.items():
            if name != "triton":
                lines.append((item["name"], name, f"{taken / seconds['triton']:.2f}x"))
        for name, ratio in item.get("row", {}).get("ratios", {}).items():
            lines.append((item["name"], name, "-" if ratio is None else f"{ratio:.2f}x"))
    return lines


def is_right(kept: Record) -> bool:
    """Whether nothing that ran was wrong; what failed for want of memory or time is no fault."""
    return not any(item.get("state") == WRONG for item in kept.items)


def ops_named(names: Iterable[str] | None) -> list[str]:
    """Ops with Triton kernels, all by default."""
    known = [s.name for s in specs() if "triton" in s.dispatcher.backends]
    wanted = list(names or known)
    return [name for name in known if name in wanted]
