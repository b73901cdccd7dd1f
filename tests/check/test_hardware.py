"""The checks for GPUs, as far as they run without one; each must see a fault."""

from __future__ import annotations

import torch

import vitfast.ops
from vitfast.check import hardware
from vitfast.check.findings import OK, WRONG
from vitfast.ops.spec import OpSpec

SPEC = vitfast.ops.spec_of("layer_norm")
SAMPLE = next(s for s in SPEC.samples if s.name == "prime_width")


def test_determinism():
    assert hardware.determinism(SPEC, SAMPLE, torch.float32, "auto", "cpu", repeats=3) == []
    calls = iter(range(1000))

    def drifting(*args, **kwargs):
        return SPEC.public(*args, **kwargs) * (1 + 1e-6 * next(calls))

    spec = OpSpec(SPEC.name, drifting, SPEC.reference, SPEC.dispatcher, SPEC.samples, SPEC.cost)
    assert hardware.determinism(spec, SAMPLE, torch.float32, "auto", "cpu", repeats=3)


def test_faults_become_findings(monkeypatch):
    def checks(spec, backend, seed):
        yield "streams", []
        yield f"fuzz from {seed}", ["seed 7: one", "seed 8: two"]

    monkeypatch.setattr(hardware, "all_checks", checks)
    found = list(hardware.check_hardware(SPEC, 7))
    assert [(f.level, f.name, f.case, f.backend, f.state, f.reason) for f in found] == [
        ("hardware", "layer_norm", "streams", "triton", OK, ""),
        ("hardware", "layer_norm", "fuzz from 7", "triton", WRONG, "seed 7: one; seed 8: two"),
    ]
