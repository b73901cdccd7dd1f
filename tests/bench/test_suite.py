"""The standard set of measurements, and what stops it."""

from __future__ import annotations

import pytest
import torch

from vitfast.bench import machine, ops, suite
from vitfast.bench.peers import Setting
from vitfast.bench.record import Result, Row
from vitfast.bench.suite import Options, Part
from vitfast.errors import InputValueError

OPTIONS = Options(
    {"ops": ["eager"], "blocks": ["eager"], "models": ["eager"]},
    {"ops": 0.01, "blocks": 0.01, "models": 0.01},
    with_memory=False,
)
SMALL = {"model": "test_vit", "img_size": (64, 64)}


@pytest.fixture(autouse=True)
def ceilings(monkeypatch):
    monkeypatch.setattr(machine, "gemm_gflops", lambda device, dtype: 100.0)
    monkeypatch.setattr(machine, "copy_gbs", lambda device: 10.0)


class Minutes:
    """A clock that moves by what each measurement takes."""

    def __init__(self, monkeypatch, each: float, cases: dict[str, int]):
        self.now = 0.0
        self.run: list[str] = []

        def measure(part, progress):
            if part.case == "broken":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
            self.now += 60 * each
            self.run.append(part.level)
            progress("timing", 1.0)
            return Row(part.level, "x", "1", "float32", "infer", "cpu", {"vitfast": Result(1.0)})

        def found(part, setting, options):
            return [lambda progress: measure(part, progress)] * cases.get(part.level, 1)

        monkeypatch.setattr(suite, "cases", found)

    def __call__(self) -> float:
        return self.now


def test_the_set_of_a_cpu_runs_every_level():
    parts = [
        Part("models", **SMALL),
        Part("blocks", **SMALL, train=True),
        Part("ops", **SMALL, ops=("layer_norm", "attention")),
        Part("ops", None, ops=("layer_norm",), case="prime_width"),
    ]
    seen = []
    said = []

    def show(text, done):
        said.append(text)
        seen.append(done)

    rows, notes = suite.run(parts, Setting(), OPTIONS, 5.0, show)
    assert {"test_vit: building", "test_vit: preparing vitfast", "test_vit: timing"} <= set(said)
    assert notes == []
    assert [row.level for row in rows[:2]] == ["models", "blocks"]
    assert [row.passes for row in rows[:2]] == ["infer", "train"]
    assert {row.case.split()[0] for row in rows[2:]} == {"layer_norm", "attention"}
    assert all(row.results["eager"].median_ms for row in rows)
    assert seen == sorted(seen) and 3 < seen[-1] <= 4


def test_nothing_starts_after_the_time_is_over(monkeypatch):
    clock = Minutes(monkeypatch, 1.0, {"ops": 3})
    parts = [Part("models"), Part("ops"), Part("blocks", train=True)]
    rows, notes = suite.run(parts, Setting(), OPTIONS, 2.5, lambda text, done: None, clock)
    assert clock.run == [row.level for row in rows] == ["models", "ops", "ops"]
    assert notes == [
        "ops vit_base_patch16_224 batch 1 infer: 1 cases left out, out of time",
        "blocks vit_base_patch16_224 batch 1 train: left out, out of time",
    ]


def test_what_does_not_fit_leaves_the_rest_alone(monkeypatch):
    clock = Minutes(monkeypatch, 1.0, {})
    parts = [Part("ops", None, ops=("attention",), case="broken"), Part("models")]
    rows, notes = suite.run(parts, Setting(), OPTIONS, 9.0, lambda text, done: None, clock)
    assert [row.level for row in rows] == ["models"]
    assert notes == ["ops attention broken infer: OutOfMemoryError: CUDA out of memory. Tried to "
                     "allocate"]  # fmt: skip


@pytest.mark.parametrize("device", suite.PARTS)
def test_the_standard_parts_exist(device):
    for part in suite.PARTS[device]:
        if part.model is None:  # ops on a listed sample: that name has to be one
            (spec,) = ops.specs(part.ops)
            assert part.case in [sample.name for sample in spec.samples]


def test_a_part_without_cases_is_refused():
    with pytest.raises(InputValueError, match="nothing to time: no .* call of attention in sample"):
        suite.cases(Part("ops", None, ops=("attention",), case="no_such"), Setting(), OPTIONS)


def test_kernels_of_a_vendor_say_why_they_do_not_run():
    (measure,) = suite.cases(
        Part("ops", None, ops=("attention",), case="head_dim_7"), Setting(),
        Options({"ops": ["flash", "xformers"]}, {"ops": 0.01}, with_memory=False),
    )  # fmt: skip
    row = measure(lambda text, share: None)
    assert row.results["vitfast"].median_ms
    assert {row.results[n].reason for n in ("flash", "xformers")} == {"a kernel for GPUs"}
