"""`vitfast tune`'s search, on an op whose speed and rightness depend on its launch config."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import vitfast.ops
from vitfast.bench import tune
from vitfast.cli.main import main
from vitfast.errors import BackendUnavailableError
from vitfast.runtime.tuning import Arch, Launch, choice_of, launch_of

SPEC = vitfast.ops.spec_of("layer_norm")
SAMPLE = next(s for s in SPEC.samples if s.name == "prime_width")
DEFAULT = Launch({"ROWS": 4}, num_warps=4, num_stages=2)


class Clock:
    """Every call costs what its config says: no real time, no noise."""

    def __init__(self):
        self.cost = 0.0

    def __call__(self, call, number):
        self.cost = 0.0
        for _ in range(number):
            output = call()
        return self.cost, output


def tuned(costs, wrong=lambda launch: False, refuse=lambda launch: False):
    clock = Clock()

    def public(x, *args, backend="auto", **kwargs):
        launch = launch_of("norm", Arch("sm_90"), {"c": x.shape[-1]}, lambda *_: DEFAULT)
        clock.cost += costs(launch)
        if refuse(launch):
            raise RuntimeError("out of resources")
        return SPEC.public(x, *args, **kwargs) * (1.1 if wrong(launch) else 1)

    spec = replace(SPEC, public=public)
    return tune.tune(spec, SAMPLE, torch.float32, False, device="cpu", seconds=0.1, watch=clock)


def test_a_faster_config_is_kept():
    found = tuned(lambda launch: 10 - launch.num_warps)
    assert found["norm"][0]["num_warps"] == 8
    assert found["norm"][0]["key"] == {"c": 13}


def test_no_entry_without_gain():
    assert tuned(lambda launch: 1.0) == {}


@pytest.mark.parametrize(
    ("costs", "best"),
    [({"triton": 1, "reference": 2}, "triton"), ({"triton": 2, "reference": 1}, "reference")],
)
@pytest.mark.parametrize("right", [True, False])
def test_which_backend_wins(costs, best, right):
    """Triton's only where it is faster and right; a backend that cannot run never."""
    clock = Clock()

    def public(x, *args, backend="auto", **kwargs):
        choice_of("layer_norm.backend", Arch("sm_90"), {"c": x.shape[-1]})
        if backend == "vendor":
            raise BackendUnavailableError("not here")
        clock.cost += costs.get(backend, 0)
        y = SPEC.public(x, *args, **kwargs)
        return y if right or backend != "triton" else y * 1.1

    backends = dict.fromkeys(("triton", "vendor", "reference"))
    spec = replace(SPEC, public=public, dispatcher=SimpleNamespace(backends=backends))
    found = tune.tune_backend(spec, SAMPLE, torch.float32, False, device="cpu", watch=clock)
    entry = {"key": {"c": 13}, "choice": best if right else "reference"}
    assert found == {"layer_norm.backend": [entry]}


def test_switches_are_tried_both_ways():
    found = list(tune.neighbours(Launch({"BLOCK_M": 64, "LAZY": 0}, 4, 2)))
    assert {launch.blocks["LAZY"] for launch in found} == {0, 1}
    assert {launch.blocks["BLOCK_M"] for launch in found} == {32, 64, 128}


def test_a_wrong_config_never_wins():
    found = tuned(lambda launch: 1 / launch.num_warps, wrong=lambda launch: launch.num_warps == 8)
    assert found == {}


def test_refuses_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 2
    assert "no GPU" in capsys.readouterr().err
