"""Whether the automatic choice has a fused kernel for an op's calls on a device, in a dtype.

Where it has none, an op runs its reference, which is no faster than timm and may do more work: a
swapped layer asks here first, and leaves the call to timm's forward. An op that is called directly
runs its reference all the same, and a backend that is asked for by name always runs.

The kernels of the C++ extension are trusted by the tests. A GPU's are trusted where a verdict says
that they are right there (`vitfast.runtime.verdicts`), one for the forward and one for the backward
pass. What is decided stays decided in a process, so that its results do not change bits in the
middle of a run: but for `adopt`, which `vitfast.prepare` calls, and `withdraw`, when a kernel
cannot be launched after all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch

from vitfast.errors import first_line
from vitfast.runtime import native, triton, verdicts
from vitfast.runtime.launches import choose_anew, from_tables
from vitfast.runtime.library import autocast_dtype
from vitfast.runtime.verdicts import RIGHT, Question, Verdict, Verdicts
from vitfast.settings import logger, settings

_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "interpreter": (torch.float32, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
"""That the kernels of the C++ extension, and Triton's, take."""
WITHOUT_OURS = frozenset({"varlen_attention"})
"""Ops that on GPUs run none of vitfast's own kernels: there is nothing to distrust or to test. A
layer that calls one asks it whether torch's take the call."""


def untrusted(ops: tuple[str, ...], x: torch.Tensor) -> str:
    """Why layers leave a call to timm's forward rather than to these ops; "" where they do not.

    Args:
        ops: names of `vitfast.ops`; without any there is nothing to distrust.
        x: the call's input; its device, its dtype and that of autocast are what counts, and whether
            gradients are enabled, for then the backward is needed too.
    """
    if not ops or settings.backend != "auto" or _assumed:
        return ""
    device = x.device
    tracing, train = torch.compiler.is_compiling(), torch.is_grad_enabled()
    return _reason(ops, device, x.dtype, autocast_dtype(device), train, tracing)


@torch.compiler.assume_constant_result
def _reason(
    ops: tuple[str, ...], device: torch.device, dtype: torch.dtype, autocast: torch.dtype | None,
    train: bool, tracing: bool,
) -> str:  # fmt: skip
    missing = tuple(native.reasons()) if device.type == "cpu" else ()
    key = (ops, device, dtype, autocast, train, missing, settings.trust)
    found = _ANSWERS.get(key)
    if found is None:
        found, is_open = _untrusted(
            ops, device, (dtype, autocast or dtype), train, missing, tracing
        )
        if not is_open:
            _ANSWERS[key] = found
    return found


_ANSWERS: dict[object, str] = {}


def _untrusted(
    ops: tuple[str, ...], device: torch.device, dtypes: tuple[torch.dtype, ...], train: bool,
    missing: tuple[str, ...], tracing: bool,
) -> tuple[str, bool]:  # fmt: skip
    """The answer of `untrusted`, and whether a later call may be given another one."""
    kind = "interpreter" if device.type == "cpu" and missing and interprets() else device.type
    takes = _DTYPES.get(kind)
    if takes is None:
        return f"there are no kernels for {device.type}", False
    for given in dtypes:
        if given not in takes:
            name = "the CPU" if device.type == "cpu" else "GPUs"
            return f"there are no kernels for {given} on {name}", False
    if kind == "cpu":
        return "; ".join(missing), False
    why = triton.available()
    if why:
        return "; ".join(why), False
    reasons: dict[str, list[str]] = {}
    is_open = False
    for op in (op for op in ops if op not in WITHOUT_OURS):
        for given in dict.fromkeys(dtypes):
            reason, undecided = _doubt(op, device, given, train, tracing)
            is_open |= undecided
            if reason and op not in reasons.get(reason, ()):
                reasons.setdefault(reason, []).append(op)
    return "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items()), is_open


def interprets() -> bool:
    """Whether Triton's interpreter stands in for a GPU in this process."""
    return triton.available() == [] and triton.interpreting()


def doubt(op: str, device: torch.device, dtype: torch.dtype, train: bool) -> str:
    """Why the automatic choice leaves an op's own GPU kernels alone; "" where it may pick them.

    Args:
        train: whether the backward will be needed too.
    """
    return _doubt(op, device, dtype, train, torch.compiler.is_compiling())[0]


def _doubt(
    op: str, device: torch.device, dtype: torch.dtype, train: bool, tracing: bool
) -> tuple[str, bool]:
    name = str(dtype).removeprefix("torch.")
    for passes in verdicts.PASSES[: 2 if train else 1]:
        reason, is_open = _decided(Question(op, name, passes), device, tracing)
        if reason:
            return reason, is_open
    return "", False


_DECISIONS: dict[tuple[Question, torch.device], str] = {}


def _decided(question: Question, device: torch.device, tracing: bool) -> tuple[str, bool]:
    """Why not, or ""; and whether that is left open.

    It is while torch.compile traces or a CUDA graph is captured, where nothing is known yet: what
    is traced must not settle what eager calls do after a test.
    """
    if settings.trust == "never":
        return "settings.trust is 'never'", False
    found = _DECISIONS.get((question, device))
    if found is not None:
        return found, False
    verdict = _known(device).get(question)
    if verdict is None:
        if tracing or _is_captured(device):
            return _UNTESTED, True
        found = _UNTESTED
    else:
        found = _reason_of(verdict)
    _DECISIONS[question, device] = found
    return found, False


_UNTESTED = "not tested on this machine yet; vitfast.prepare(model, sample) does"


def _reason_of(verdict: Verdict) -> str:
    return "" if verdict.state == RIGHT else f"{verdict.state} in a test: {verdict.reason}"


@from_tables
def _known(device: torch.device) -> Verdicts:
    return verdicts.known(device)


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def adopt(device: torch.device, found: Mapping[Question, Verdict]) -> None:
    """Decide by these verdicts from now on, whatever was decided before."""
    for question, verdict in found.items():
        _DECISIONS[question, device] = _reason_of(verdict)
    _ANSWERS.clear()
    choose_anew()


def refuse(device: torch.device, questions: Iterable[Question], reason: str) -> None:
    """Leave these kernels alone from now on in this process."""
    for question in questions:
        _DECISIONS[question, device] = reason
    _ANSWERS.clear()
    choose_anew()


def withdraw(op: str, device: torch.device, dtype: torch.dtype, error: BaseException) -> None:
    """Leave an op's kernels alone from now on, in both passes, since one could not be launched."""
    line = f"{type(error).__name__}: {first_line(error)}"
    name = str(dtype).removeprefix("torch.")
    questions = [Question(op, name, passes) for passes in verdicts.PASSES]
    if not _DECISIONS.get((questions[0], device), ""):
        logger.warning(
            "%s: a kernel could not be launched for %s on %s; torch's own run from now on (%s)",
            op, name, device, line,
        )  # fmt: skip
    refuse(device, questions, f"a launch failed: {line}")


def decisions(device: torch.device, questions: Iterable[Question]) -> dict[Question, str]:
    """Why not, or "", of each question; they are decided now where they were not."""
    return {q: _decided(q, device, False)[0] for q in questions}


def forget() -> None:
    """Decide everything anew, from the files: for tests, and where a machine has changed."""
    _DECISIONS.clear()
    _ANSWERS.clear()
    _known.cache_clear()
    verdicts.machine_of.cache_clear()
    verdicts.kernels_of.cache_clear()
    choose_anew()


_assumed: list[None] = []


@contextlib.contextmanager
def assuming() -> Iterator[None]:
    """Within, layers run their ops whatever is trusted; the ops' own choice stays what it is.

    For recording the calls that a model makes.
    """
    _assumed.append(None)
    try:
        yield
    finally:
        _assumed.pop()
