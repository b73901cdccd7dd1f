"""JSON records: whole or not at all, and compared by ratio."""

from __future__ import annotations

import json
import os

import pytest

from vitfast.bench import record
from vitfast.bench.record import Result, Row
from vitfast.bench.timer import Timing
from vitfast.errors import InputValueError


def row(ours: float | None, *, case: str = "attention vit_base_224", **peers: float | None) -> Row:
    results = {
        name: Result(reason="not installed") if ms is None else Result(median_ms=ms)
        for name, ms in peers.items()
    }
    results["vitfast"] = Result(median_ms=ours, reason="" if ours else "not swapped")
    return Row("ops", case, "1x197x768", "float32", "infer", "cpu", results)


def test_result_of_a_timing_is_in_milliseconds():
    found = Result.of(Timing((0.001, 0.002, 0.003)), peak_mb=5.0)
    assert (found.median_ms, found.q1_ms, found.q3_ms) == pytest.approx((2.0, 1.5, 2.5))
    assert (found.rounds, found.peak_mb) == (3, 5.0)


def test_ratio_is_how_many_times_faster_vitfast_is():
    found = row(2.0, eager=5.0, openvino=None)
    assert found.ratio("eager") == 2.5
    assert found.ratio("openvino") is None
    assert found.ratios() == {"eager": 2.5}


def test_a_record_comes_back(tmp_path):
    path = tmp_path / "out.json"
    record.write_json(
        path, record.bench_document([row(2.0, eager=5.0)], {"name": "here"}, floors={})
    )
    found = record.read(path)
    assert found["machine"] == {"name": "here"}
    assert found["rows"][0]["ratios"] == {"eager": 2.5}
    assert found["rows"][0]["results"]["vitfast"]["median_ms"] == 2.0
    assert os.listdir(tmp_path) == ["out.json"]


def test_values_that_are_no_json_become_null(tmp_path):
    path = tmp_path / "out.json"
    record.write_json(path, {"a": float("inf"), "b": [float("nan"), 1.0], "c": (2,)})
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 1.0], "c": [2]}


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    path.write_text("old")

    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.json"]


def test_a_better_ratio_and_a_slightly_worse_one_pass(tmp_path):
    before = record.bench_document([row(2.0, eager=5.0, openvino=2.0)], {})
    found = record.changes(before, [row(2.1, eager=5.0, openvino=2.2)])
    assert [(c.peer, c.worse) for c in found] == [("eager", False), ("openvino", False)]
    assert found[0].relative == pytest.approx(2.0 / 2.1 - 1)


def test_more_than_ten_percent_worse_is_a_regression():
    before = record.bench_document([row(2.0, eager=5.0)], {})
    assert not record.changes(before, [row(2.2, eager=5.0)])[0].worse  # -9.1 %
    assert record.changes(before, [row(2.3, eager=5.0)])[0].worse  # -13 %


def test_a_slower_machine_is_no_regression():
    before = record.bench_document([row(2.0, eager=5.0)], {})
    assert record.changes(before, [row(20.0, eager=50.0)])[0].relative == pytest.approx(0.0)


def test_rows_and_peers_that_only_one_file_has_are_left_out():
    before = record.bench_document([row(2.0, eager=5.0, openvino=None)], {})
    now = [row(2.0, eager=5.0, openvino=2.0), row(2.0, case="layer_norm x", eager=4.0)]
    assert [(c.key[1], c.peer) for c in record.changes(before, now)] == [
        ("attention vit_base_224", "eager")
    ]


def test_a_model_that_is_not_swapped_any_more_got_worse():
    before = record.bench_document([row(2.0, eager=5.0, openvino=2.0)], {})
    found = record.changes(before, [row(None, eager=5.0, openvino=2.0)])
    assert [(c.peer, c.before, c.after, c.worse) for c in found] == [
        ("eager", 2.5, 1.0, True),
        ("openvino", 1.0, 0.4, True),
    ]


def test_a_model_that_never_was_swapped_has_nothing_to_compare():
    plain = row(None, eager=5.0)
    assert not plain.swapped and plain.ratios() == {}
    assert record.changes(record.bench_document([plain], {}), [plain]) == []


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "No such file"),
        ("{", "is not JSON"),
        ("[]", "was not written by"),
        ('{"kind": "vitfast check"}', "was not written by"),
        ('{"kind": "vitfast bench", "schema": 99}', "schema 99"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputValueError, match=message):
        record.read(path)


def test_places_that_cannot_be_written_are_found_beforehand(tmp_path):
    assert record.check_writable(tmp_path / "new.json") == tmp_path / "new.json"
    with pytest.raises(InputValueError, match="is a directory"):
        record.check_writable(tmp_path)
    with pytest.raises(InputValueError, match="there is no folder"):
        record.check_writable(tmp_path / "a" / "b.json")
