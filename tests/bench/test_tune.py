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
from vitfast.ops.attention import vendor
from vitfast.runtime.launches import Arch, Launch, choice_of, launch_of

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


def tuned(costs, wrong=lambda launch: False, refuse=lambda launch: False, **options):
    clock = Clock()

    def public(x, *args, backend="auto", **kwargs):
        launch = launch_of("norm", Arch("sm_90"), {"c": x.shape[-1]}, lambda *_: DEFAULT)
        clock.cost += costs(launch)
        if refuse(launch):
            raise RuntimeError("out of resources")
        return SPEC.public(x, *args, **kwargs) * (1.1 if wrong(launch) else 1)

    spec = replace(SPEC, public=public)
    terms = tune.Terms("cpu", seconds=0.1, watch=clock, **options)
    return tune.tune(spec, SAMPLE, torch.float32, False, terms)


def test_a_faster_config_is_kept():
    found = tuned(lambda launch: 10 - launch.num_warps)
    assert found["norm"][0]["num_warps"] == 8
    assert found["norm"][0]["key"] == {"c": 13}


def test_without_gain_the_first_is_kept():
    """Or the entry of some other problem would stand in for it."""
    (entry,) = tuned(lambda launch: 1.0)["norm"]
    assert entry == {"key": {"c": 13}, "blocks": {"ROWS": 4}, "num_warps": 4, "num_stages": 2}


def test_several_parts_are_changed_one_after_another():
    seen = []

    def costs(launch):
        seen.append(launch)
        return 1 / (launch.num_warps * launch.blocks["ROWS"] * launch.num_stages)

    (entry,) = tuned(costs)["norm"]
    assert (entry["num_warps"], entry["num_stages"], entry["blocks"]) == (8, 4, {"ROWS": 256})
    assert len({str(launch) for launch in seen}) < 40


def test_what_is_known_is_not_timed_again():
    known = {"norm": [{"key": {"c": 13}}]}
    assert tuned(lambda launch: 10 - launch.num_warps, known=known) == {}
    assert tuned(lambda launch: 10 - launch.num_warps, known={"norm": [{"key": {"c": 14}}]})


def test_nothing_begins_after_the_time_is_over():
    assert tuned(lambda launch: 10 - launch.num_warps, until=0.0) == {}


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
    terms = tune.Terms("cpu", seconds=0.1, watch=clock)
    found = tune.tune_backend(spec, SAMPLE, torch.float32, False, terms)
    entry = {"key": {"c": 13}, "choice": best if right else "reference"}
    assert found == {"layer_norm.backend": [entry]}


def test_neighbours_differ_in_one_part():
    first = Launch({"BLOCK_M": 64, "LAZY": 0, "GROUP": 8, "OTHER": 3}, 4, 2)
    m, lazy, group, other, warps, stages = tune.neighbours(first)
    assert [launch.blocks["BLOCK_M"] for launch in m] == [32, 128]
    assert [launch.blocks["LAZY"] for launch in lazy] == [1]
    assert [launch.blocks["GROUP"] for launch in group] == [4, 16]  # never 0: kernels divide by it
    assert other == []
    assert [launch.num_warps for launch in warps] == [2, 8]
    assert [launch.num_stages for launch in stages] == [1, 3, 4]
    for launch in (*m, *lazy, *group, *warps, *stages):
        parts = {**launch.blocks, **launch.options()}
        assert sum(parts[n] != v for n, v in {**first.blocks, **first.options()}.items()) == 1


def test_a_wrong_config_never_wins():
    found = tuned(lambda launch: 1 / launch.num_warps, wrong=lambda launch: launch.num_warps == 8)
    assert found["norm"][0]["num_warps"] == 4


def test_refuses_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_the_vendor_kernel_that_is_fastest_and_right():
    """On a CPU all names run SDPA's one kernel; the clock tells them apart."""
    spec = vitfast.ops.spec_of("attention")
    sample = next(s for s in spec.samples if s.name == "head_dim_24")
    costs = {"cudnn": 3.0, "flash": 1.0, "efficient": 0.5, "xformers": 0.1}
    clock = Clock()

    def public(q, *args, backend="auto", **kwargs):
        name = vendor._forced[-1]
        clock.cost += costs[name]
        if name == "xformers":
            raise ImportError(name)
        return spec.public(q, *args, backend=backend, **kwargs) * (2 if name == "efficient" else 1)

    terms = tune.Terms("cpu", seconds=0.1, watch=clock)
    arguments = (replace(spec, public=public), sample, torch.float32)
    found = tune.tune_vendor(*arguments, False, terms)
    ((entry,),) = found.values()
    assert entry["choice"] == "flash"
    assert entry["key"]["pass"] == "infer" and entry["key"]["head_dim"] == 24
    assert tune.tune_vendor(*arguments, False, replace(terms, known=found)) == {}
    assert tune.tune_vendor(*arguments, True, replace(terms, known=found)) != {}
