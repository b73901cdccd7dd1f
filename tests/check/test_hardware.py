"""The checks for GPUs, as far as they run without one; each must see a fault."""

from __future__ import annotations

import torch

import vitfast.ops
from vitfast.check import hardware
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
