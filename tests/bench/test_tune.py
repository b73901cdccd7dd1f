"""`vitfast tune`'s search, on an op whose speed and rightness depend on its launch config."""

from __future__ import annotations

from dataclasses import replace

import torch

import vitfast.ops
from vitfast.bench import tune
from vitfast.cli.main import main
from vitfast.runtime.tuning import Arch, Launch, launch_of

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


def test_a_wrong_config_never_wins():
    found = tuned(lambda launch: 1 / launch.num_warps, wrong=lambda launch: launch.num_warps == 8)
    assert found == {}


def test_refuses_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 2
    assert "no GPU" in capsys.readouterr().err
