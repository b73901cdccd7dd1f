"""Ceilings, floors and memory, as far as they can be told without timing anything."""

from __future__ import annotations

import subprocess

import pytest
import torch

import vitfast
from vitfast.bench import machine, memory
from vitfast.bench.record import Result, Row
from vitfast.ops.spec import Cost
from vitfast.runtime import commit


def row_of(**median_ms: float | None) -> Row:
    results = {name: Result(median_ms=ms) for name, ms in median_ms.items()}
    return Row("ops", "layer_norm", "1x197x768", "float32", "infer", "cpu", results)


@pytest.fixture
def ceilings(monkeypatch):
    monkeypatch.setattr(machine, "gemm_gflops", lambda device, dtype: 100.0)
    monkeypatch.setattr(machine, "copy_gbs", lambda device: 10.0)


def test_the_floor_is_the_larger_of_two_times(ceilings):
    # 1 GFLOP at 100 GFLOP/s is 10 ms; 1 GB at 10 GB/s is 100 ms.
    assert machine.floor_seconds(Cost(1e9, 1e6), "cpu", torch.float32) == pytest.approx(0.01)
    assert machine.floor_seconds(Cost(1e9, 1e9), "cpu", torch.float32) == pytest.approx(0.1)


def test_the_rate_is_in_the_unit_that_binds(ceilings):
    row = row_of(vitfast=20.0, eager=40.0)
    machine.rate(row, Cost(1e9, 1e6), "cpu", torch.float32)
    assert (row.rate, row.unit) == (pytest.approx(50.0), "GFLOP/s")
    row = row_of(vitfast=200.0)
    machine.rate(row, Cost(1e6, 1e9), "cpu", torch.float32)
    assert (row.rate, row.unit) == (pytest.approx(5.0), "GB/s")


def test_every_contender_is_held_against_the_floor(ceilings):
    row = row_of(vitfast=20.0, eager=40.0, openvino=None)
    machine.rate(row, Cost(1e9, 1e6), "cpu", torch.float32)
    eager = row.results["eager"]
    assert (eager.gflops, eager.gbs) == (pytest.approx(25.0), pytest.approx(0.025))
    assert eager.floor_share == pytest.approx(0.25)
    assert row.floor_share == row.results["vitfast"].floor_share == pytest.approx(0.5)
    assert row.results["openvino"].floor_share is None


def test_ceilings_are_measured_once(monkeypatch):
    measured = []

    def best(call, device):
        measured.append(call().shape)
        return 1e-3

    monkeypatch.setattr(machine, "_best", best)
    monkeypatch.setattr(machine, "GEMM_SHAPES", ((2, 3, 4), (5, 6, 7)))
    machine._gemm_gflops.cache_clear()
    try:
        found = machine.gemm_gflops("cpu", torch.float32)
        assert found == pytest.approx(2 * 5 * 6 * 7 / 1e-3 / 1e9)
        assert {tuple(s) for s in measured} == {(2, 4), (5, 7)}
        count = len(measured)
        assert machine.gemm_gflops("cpu", torch.float32) == found
        assert len(measured) == count
    finally:
        machine._gemm_gflops.cache_clear()


def test_a_prepacked_product_is_the_same_product():
    x, weight = torch.randn(8, 16), torch.randn(4, 16)
    for call in machine._products(x, weight):
        torch.testing.assert_close(call(), x @ weight.T)


def test_the_machine_block_has_what_a_record_needs():
    found = machine.describe()
    assert found["device"] == "cpu"
    assert found["versions"]["vitfast"] == vitfast.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert {"cpu", "threads", "isa", "native", "commit"} <= set(found)


def test_no_commit_where_there_is_no_checkout(monkeypatch):
    def no_git(*arguments):
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(commit, "_git", no_git)
    commit.commit.cache_clear()
    assert commit.commit() is None
    commit.commit.cache_clear()


def test_the_commit_of_somebody_elses_checkout_is_not_ours(monkeypatch):
    monkeypatch.setattr(commit, "_git", lambda folder, *arguments: "/somewhere/else")
    commit.commit.cache_clear()
    assert commit.commit() is None
    commit.commit.cache_clear()


@pytest.mark.skipif(not memory.reset_peak(), reason="this system cannot reset the high-water mark")
def test_added_memory_is_the_peak_of_the_call_alone():
    kept = torch.ones(50_000_000 // 4)  # there before, so it does not count

    def call() -> torch.Tensor:
        large = torch.ones(80_000_000 // 4)  # freed inside, and counts
        return large[:10].clone()

    added = memory.added_by(call)
    assert 75 < added < 110
    assert memory.added_by(lambda: kept.sum()) < 20


def test_memory_is_unknown_where_the_mark_cannot_be_reset(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "no" / "such" / "file")
    assert memory.added_by(lambda: None) is None
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    assert memory.resident_mb() is None
