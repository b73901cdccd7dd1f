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


def test_the_checks_of_a_backend():
    """On a GPU all kinds, by name; in the interpreter what it can run."""
    found = hardware.checks_of(SPEC, "triton", "cuda")
    kinds = {name.split(" ")[0] for name in found}
    assert kinds == {"determinism", "streams", "graph", "out", "2^31", "random"}
    assert {name.split(" ")[-1] for name in found if name.startswith("determinism")} == {
        "torch.bfloat16", "torch.float16", "torch.float32",
    }  # fmt: skip
    small = hardware.checks_of(SPEC, "reference", "cpu")
    assert small and all(name.startswith("determinism") for name in small)
    assert all(check() == [] for check in small.values())
