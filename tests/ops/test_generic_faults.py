"""The generic numerics tests catch broken kernels: each fault here must be rejected on some sample.

A fault replaces the forward or backward of the op's first backend. The sample that rejects it
passes with the sound backend, so that the fault alone is what was caught.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest

import vitfast.ops as ops
from tests.ops.faults.attention import ATTENTION, VARLEN, WINDOWS
from tests.ops.faults.norms import GRN, GROUPS, NORMS, PATCHES
from tests.ops.faults.products import DWCONV, GEMMS, MLP
from vitfast.errors import BackendUnavailableError
from vitfast.testing.cases import Case
from vitfast.testing.errors import raise_if_wrong

pytestmark = pytest.mark.usefixtures("needs_native")

FAULTS = NORMS | GROUPS | ATTENTION | VARLEN | GEMMS | MLP | PATCHES | WINDOWS | DWCONV | GRN


def judge(case, which, backend):
    if which == "forward":
        return case.judge(case.outputs(backend=backend))
    return case.judge_gradients(case.gradients(case.trained, backend=backend))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault, monkeypatch):
    op, which, _ = fault.split()
    spec = ops.spec_of(op)
    name, backend = next(iter(spec.dispatcher.backends.items()))
    sound = getattr(backend, which)
    broken = dataclasses.replace(backend, **{which: partial(FAULTS[fault], sound)})
    for sample in (s for s in spec.samples if s.tags.isdisjoint({"real", "large", "empty"})):
        for dtype in spec.dtypes:
            case = Case(spec, sample, dtype)
            try:
                raise_if_wrong(judge(case, which, name))
            except (AssertionError, BackendUnavailableError):
                continue  # tells nothing about the fault
            with monkeypatch.context() as patch:
                patch.setitem(spec.dispatcher.backends, name, broken)
                try:
                    raise_if_wrong(judge(case, which, name))
                except AssertionError:
                    return
    pytest.fail(f"no sample of {op} notices this fault")


def test_every_op_has_faults_in_both_directions():
    found = {tuple(fault.split()[:2]) for fault in FAULTS}
    assert found == {(op, which) for op in ops.NAMES for which in ("forward", "backward")}
