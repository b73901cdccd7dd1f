"""prepare: the GPU kernels that a model needs, tested and timed where they are to run.

The tests run in processes of their own, once on a machine: what they find is kept (see
`vitfast.runtime.verdicts`), and so are the kernels that they compile, in Triton's own cache. Until
kernels are known to be right on a device, layers there run timm's forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from vitfast.errors import InputValueError
from vitfast.runtime import trust
from vitfast.runtime.library import autocast_dtype
from vitfast.runtime.verdicts import FAILED, PASSES, Question
from vitfast.runtime.wrappers import unwrapped
from vitfast.selftest.problems import Problem, recording
from vitfast.selftest.session import TrustReport, decide, is_testable
from vitfast.testing.inputs import map_tensors

__all__ = ["TrustReport", "prepare", "prepare_ops"]


def prepare(
    model: nn.Module,
    sample: Any = None,
    *,
    train: bool | None = None,
    sync: bool = False,
    progress: bool | None = None,
) -> TrustReport:
    """Test, on the model's GPU, the kernels that it needs, and use those that are right and faster.

    Runs the swapped model once on `sample` (in evaluation mode, on torch's own kernels) to see
    which ops it calls. Each op's kernels then run, in a process of their own, on small problems
    that reach all their branches and on the model's own, against float64; those that are right are
    timed beside torch's own. What was found before is not tested again. Call it under the autocast
    that the model will run under.

    Args:
        model: a swapped model on the GPU where it is to run; inside torch.compile's, DataParallel's
            and DistributedDataParallel's wrappers it is the model itself that runs here. On a CPU
            there is nothing to do.
        sample: what the model is called with: a tensor, a tuple of positional arguments, or a dict
            of named ones. None: only the samples of the ops that its layers may call.
        train: whether gradients are needed: True or False; None for both passes.
        sync: in a torch.distributed process group, use what every rank trusts, and nothing else,
            so that all compute alike. Every rank has to call it.
        progress: whether to show a line of progress; where the error output is a terminal by
            default.

    Returns:
        TrustReport, a line an op, dtype and pass.

    Raises:
        InputTypeError: the model is no torch.nn.Module.
        InputValueError: `sync` without a process group.
    """
    model = unwrapped(model)
    if sync and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise InputValueError("prepare: sync=True needs torch.distributed's process group")
    first = next((t for t in tree_leaves(sample) if isinstance(t, torch.Tensor)), None)
    like = first if first is not None else next(model.parameters(), None)
    if like is None:
        return TrustReport("?", note="the model has no parameters and there is no sample")
    passes = PASSES if train is None or train else PASSES[:1]
    ops = _ops_of(model)
    wanted = _wanted(ops, like, passes)
    if first is not None and is_testable(like.device):
        for problem in _recorded(model, sample, bool(passes[1:])):
            for name in passes:
                wanted.setdefault(Question(problem.op, problem.dtype, name), []).append(problem)
    report = decide(like.device, wanted, progress)
    if sync:
        _agree(like.device, list(wanted), report)
    return report


def prepare_ops(ops: Iterable[str], like: torch.Tensor) -> TrustReport:
    """As `prepare`, of these ops, for calls with tensors like this one, on the ops' samples."""
    return decide(like.device, _wanted(tuple(ops), like, PASSES), None)


def _wanted(
    ops: Sequence[str], like: torch.Tensor, passes: Sequence[str]
) -> dict[Question, list[Problem]]:
    """The questions about ops, in the dtype of a tensor and of autocast."""
    dtypes = dict.fromkeys((like.dtype, autocast_dtype(like.device) or like.dtype))
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    ours = [op for op in ops if op not in trust.WITHOUT_OURS]
    return {Question(op, name, p): [] for name in names for op in ours for p in passes}


def _ops_of(model: nn.Module) -> tuple[str, ...]:
    """The ops that the drop-in layers of a model may call."""
    found: dict[str, None] = {}
    for module in model.modules():
        found |= dict.fromkeys(getattr(type(module), "ops", ()))
    return tuple(found)


def _recorded(model: nn.Module, sample: Any, train: bool) -> list[Problem]:
    """The calls of ops that a model makes of a sample; its modes stay what they are."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    # In inference mode no op is recorded, and its tensors cannot be differentiated.
    with torch.inference_mode(False):
        sample = map_tensors(sample, lambda t: t.clone() if t.is_inference() else t)
    try:
        with (
            torch.inference_mode(False), recording() as problems, trust.assuming(),
            torch.set_grad_enabled(train),
        ):  # fmt: skip
            if isinstance(sample, tuple):
                model(*sample)
            elif isinstance(sample, dict):
                model(**sample)
            else:
                model(sample)
    finally:
        for module, mode in modes:
            module.training = mode
    return problems


def _agree(device: torch.device, questions: list[Question], report: TrustReport) -> None:
    """Leave alone what some rank leaves alone; every rank has to come here."""
    mine = {tuple(q): why for q, why in trust.decisions(device, questions).items()}
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    for question in questions:
        for rank, theirs in enumerate(everyone):
            why = theirs.get(tuple(question), "it was not asked for")
            if why and not mine[tuple(question)]:
                reason = f"rank {rank} leaves it alone: {why}"
                trust.refuse(device, [question], reason)
                for i, entry in enumerate(report.tested):
                    if entry.question == question:
                        report.tested[i] = replace(entry, state=FAILED, reason=reason)
                break
