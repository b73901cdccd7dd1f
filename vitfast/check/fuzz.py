"""Fuzzing: random problems for one backend of an op, judged as the samples of its spec are."""

from __future__ import annotations

import itertools
import time

import torch

from vitfast.check.random_calls import random_call
from vitfast.errors import BackendUnavailableError
from vitfast.ops.spec import OpSpec, Sample
from vitfast.testing.cases import Case


def fuzz(
    spec: OpSpec, backend: str, device: str, seed: int, seconds: float, dtypes: list[torch.dtype]
) -> tuple[int, list[str]]:
    """Run random problems one after another until the time is over.

    Args:
        seed: number of the first problem; the next have the numbers that follow.
        dtypes: working dtypes, taken in turns.

    Returns:
        How many problems ran, which leaves out those that the backend refuses, and the faults as
        sentences. Each names its seed, with which `fuzz_one` runs the problem again.
    """
    ran = 0
    faults: list[str] = []
    end = time.monotonic() + seconds
    for number in itertools.count(seed):
        if time.monotonic() > end:
            break
        try:
            faults += fuzz_one(spec, backend, device, number, dtypes)
            ran += 1
        except BackendUnavailableError:
            continue
    return ran, faults


def fuzz_one(
    spec: OpSpec, backend: str, device: str, seed: int, dtypes: list[torch.dtype]
) -> list[str]:
    """The faults of one random problem, forward and backward; an exception is one.

    Raises:
        BackendUnavailableError: the backend refuses this problem.
    """
    dtype = dtypes[seed % len(dtypes)]
    sample = Sample(f"seed_{seed}", lambda d, g: random_call(spec.name, d, seed))
    case = Case(spec, sample, dtype)
    try:
        call = case.call.map(lambda t: t.to(device))
        outputs = [t.cpu() for t in call.run(spec.public, backend=backend)]
        reports = case.judge(outputs, backend)
        found = call.gradients(
            spec.public, [g.to(device) for g in case.output_grads], names=case.trained,
            backend=backend,
        )  # fmt: skip
        found = {n: None if t is None else t.cpu() for n, t in found.items()}
        reports += case.judge_gradients(found, backend)
    except BackendUnavailableError:
        raise
    except Exception as error:
        return [f"seed {seed} {dtype}: {type(error).__name__}: {error}"]
    return [f"seed {seed} {dtype}: {p}" for r in reports for p in r.problems]
