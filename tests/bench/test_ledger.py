"""The page of kernels by device: current, and true to the records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vitfast.runtime import launches

pytest.importorskip("triton")

from vitfast.bench import ledger  # noqa: E402

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """What the page is made from, without records."""
    for path in ("tests/gpu", "benchmarks/results"):
        (tmp_path / path).mkdir(parents=True)
    shutil.copy(CHECKOUT / "tests/gpu/resources.json", tmp_path / "tests/gpu")
    monkeypatch.setattr(launches, "LAUNCHES", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def record(folder: Path, kind: str, arch: str, **found) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{kind}.json").write_text(json.dumps({
        "kind": f"vitfast {kind}", "created": "2031-05-06T07:08:09+00:00",
        "machine": {"arch": arch, "commit": "0123456789ab"}, **found,
    }))  # fmt: skip


def item(op: str, state: str, error: float | None = None, stage: str = "selftest") -> dict:
    found = {"stage": stage, "name": f"{op} a", "op": op, "dtype": "float16", "passes": "forward",
             "state": state}  # fmt: skip
    return found if error is None else found | {"error_over_budget": error}


def line(text: str, start: str) -> list[str]:
    """The cells of the first line that starts so."""
    found = next(row for row in text.splitlines() if row.startswith(f"| {start} "))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_the_committed_page_is_current():
    assert ledger.page(CHECKOUT) == (CHECKOUT / ledger.PAGE).read_text(), (
        "run python -m vitfast.bench.ledger"
    )


def test_an_outdated_page_is_seen(checkout, capsys):
    assert ledger.main(["--check"]) == 1
    assert "out of date" in capsys.readouterr().out
    assert ledger.main([]) == 0
    assert ledger.main(["--check"]) == 0


def test_no_record_no_claim(checkout):
    text = ledger.page(checkout)
    assert "## Measured" not in text
    claims = {cell.split("(")[0] for cell in line(text, "sm_90")[2:]}
    assert claims <= {"compiled, not run ", "changed, not compiled anew"}
    assert "¹" in "".join(line(text, "sm_75")) and "¹" not in "".join(line(text, "sm_90"))


def test_what_ran_shows_date_and_commit(checkout):
    record(
        checkout / "benchmarks/results/a-gpu", "prove", "sm_90",
        items=[
            item("layer_norm", "right", 0.25), item("add_norm", "right", 0.5),
            item("rms_norm", "wrong"), item("window_attention", "refused"),
            item("grn", "right", 0.1), item("grn", "failed", stage="hardware"),
            {"stage": "kernels", "name": "grn b", "op": "grn", "seconds": {"triton": 1.0}},
        ],
    )  # fmt: skip
    # What `vitfast prove` writes beside its record is none.
    table = checkout / "benchmarks/results/a-gpu/sm_90.json"
    table.write_text(json.dumps({"kernels": {}, "verdicts": {}}))
    carried = {"verdicts": {"ops": {"add_norm": {}}}, "kernels": {}}
    (checkout / "sm_90.json").write_text(json.dumps(carried))
    text = ledger.page(checkout)
    header = line(text, "GPU")
    cells = dict(zip(header, line(text, "sm_90"), strict=True))
    assert cells["layer_norm"] == "run (2031-05-06, 0123456789ab)"
    assert cells["add_norm"] == "picked (2031-05-06, 0123456789ab)"
    assert cells["rms_norm"] == "wrong (2031-05-06, 0123456789ab)"
    assert cells["grn"] == "failed (2031-05-06, 0123456789ab)"
    assert cells["window_attention"].startswith("compiled, not run (")
    assert line(text, "sm_80")[2].startswith("compiled, not run (")
    assert "| layer_norm | triton    | 1       | 0.25      | ok      |" in text
    assert "| rms_norm   | triton    | 1       | inf       | wrong   |" in text


def test_speeds_are_geometric_means(checkout):
    def row(case: str, level: str = "ops", **ratios: float) -> dict:
        return {
            "level": level, "case": case, "backend": "triton", "dtype": "bfloat16",
            "passes": "infer", "shape": "1x2", "floor_share": 0.5, "ratios": ratios,
        }  # fmt: skip

    record(
        checkout / "benchmarks/results/a-gpu", "bench", "sm_90",
        rows=[row("layer_norm x", eager=2.0, vendor=1.0), row("layer_norm y", eager=8.0),
              row("vit", "models", eager=1.5)],
    )  # fmt: skip
    text = ledger.page(checkout)
    cells = " ".join(line(text, "layer_norm"))
    assert cells == "layer_norm triton bfloat16 infer 2 4.00x 1.00x 50% 2031-05-06, 0123456789ab"
    assert "1.50x" in line(text, "models")
