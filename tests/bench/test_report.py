"""Numbers as people read them."""

from __future__ import annotations

import pytest

from vitfast.bench.record import Result, Row
from vitfast.bench.report import digits, milliseconds, table


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0305, "30.5 us"),
        (0.9994, "999 us"),
        (0.9996, "1.00 ms"),
        (2.414, "2.41 ms"),
        (99.96, "100 ms"),
        (999.4, "999 ms"),
        (999.6, "1.00 s"),
        (7400.0, "7.40 s"),
    ],
)
def test_milliseconds(value, text):
    assert milliseconds(value) == text


@pytest.mark.parametrize("value, text", [(1.234, "1.23"), (9.996, "10.0"), (250.4, "250")])
def test_digits(value, text):
    assert digits(value) == text


def test_table_puts_peers_side_by_side_and_reasons_below():
    row = Row(
        "models", "vit_tiny", "1x3x224x224", "float32", "infer", "cpu",
        {
            "eager": Result(median_ms=20.0, peak_mb=100.0),
            "openvino": Result(reason="openvino not installed"),
            "vitfast": Result(median_ms=10.0, peak_mb=90.0, error_over_budget=0.25),
        },
        rate=123.4, unit="GFLOP/s", floor_share=0.5, memory_floor_mb=70.4, note="a note",
    )  # fmt: skip
    header, (cells,), notes = table([row], ["eager", "openvino"])
    found = dict(zip(header, cells, strict=True))
    assert found["eager"] == "20.0 ms (2.00x)"
    assert "openvino" not in found
    assert found["vitfast"] == "10.0 ms"
    assert found["rate"] == "123 GFLOP/s"
    assert found["of floor"] == "50%"
    assert [found[f"MB {n}"] for n in ("eager", "vitfast", "floor")] == ["100", "90", "70"]
    assert found["error/budget"] == "0.25"
    assert notes == ["openvino: openvino not installed", "vit_tiny: a note"]


def test_a_peer_that_ran_in_another_row_is_a_dash():
    rows = [
        Row("ops", name, "1", "float32", "infer", "cpu", results)
        for name, results in {
            "x": {"eager": Result(median_ms=2.0), "vitfast": Result(median_ms=1.0)},
            "y": {"eager": Result(reason="no kernel"), "vitfast": Result(median_ms=1.0)},
        }.items()
    ]
    header, cells, notes = table(rows, ["eager"])
    assert [row[header.index("eager")] for row in cells] == ["2.00 ms (2.00x)", "-"]
    assert notes == ["eager: no kernel"]


def test_a_model_that_is_not_swapped_shows_its_peers_and_no_time_of_vitfast():
    rows = [
        Row("models", name, "1", "float32", "infer", "cpu", {
            "eager": Result(median_ms=3.0), "compile": Result(median_ms=2.0), "vitfast": ours,
        })
        for name, ours in {
            "resnet50": Result(reason="not swapped"), "vit_tiny": Result(median_ms=1.0),
            "vgg11": Result(reason="not swapped"),
        }.items()
    ]  # fmt: skip
    for given in (rows, rows[:1]):  # the peers' columns stand without any ratio, too
        header, cells, _ = table(given, ["eager", "compile"])
        found = dict(zip(header, cells[0], strict=True))
        assert (found["eager"], found["compile"]) == ("3.00 ms", "2.00 ms")
        assert found["vitfast"] == "not swapped"
        assert {found[n] for n in ("rate", "of floor", "error/budget")} == {"-"}
    _, cells, notes = table(rows, ["eager", "compile"])
    assert "3.00 ms (3.00x)" in cells[1] and "1.00 ms" in cells[1]
    assert notes == ["not swapped: vitfast found nothing to replace in resnet50, vgg11"]


def test_what_was_not_measured_is_a_dash():
    row = Row("ops", "x", "1", "float32", "infer", "cpu", {"vitfast": Result(median_ms=1.0)})
    header, (cells,), _ = table([row], [])
    found = dict(zip(header, cells, strict=True))
    assert {found[n] for n in ("rate", "of floor", "MB vitfast", "MB floor", "error/budget")} == {
        "-"
    }
