"""`vitfast check`: exit status, failures first, and the file."""

from __future__ import annotations

import json

import pytest

from vitfast.bench import ops
from vitfast.check import numerics
from vitfast.runtime.dispatch import Backend


@pytest.fixture
def one_model(monkeypatch):
    monkeypatch.setattr(numerics, "MODELS", {"vit": "test_vit"})
    monkeypatch.setattr(numerics, "MODEL_SIZES", {"vit": (64, 64)})
    monkeypatch.setattr(numerics, "op_cases", lambda specs: [])


def test_one_op(vitfast, tmp_path):
    path = tmp_path / "check.json"
    status, out, err = vitfast("check", "--op", "layer_norm", "--json", path)
    assert (status, err) == (0, "")
    assert "checks passed" in out
    assert "Wrong" not in out
    found = json.loads(path.read_text())
    assert found["kind"] == "vitfast check"
    assert {f["name"] for f in found["findings"]} == {"layer_norm"}
    assert all(f["state"] in ("ok", "cannot run") for f in found["findings"])
    assert "versions" in found["machine"]


def test_models(vitfast, one_model):
    status, out, _ = vitfast("check")
    assert status == 0
    assert "test_vit" in out
    assert "3 of 3 checks passed" in out  # float32 forward and backward, bfloat16 forward


def test_a_wrong_backend_comes_first_and_fails(vitfast, monkeypatch):
    (spec,) = ops.specs(["rms_norm"])
    right = spec.dispatcher.backends["reference"]
    wrong = Backend(
        "reference", lambda *args: (2 * right.forward(*args)[0],), right.can_run, right.backward
    )
    monkeypatch.setitem(spec.dispatcher.backends, "reference", wrong)
    status, out, _ = vitfast("check", "--op", "rms_norm", "--op", "layer_norm")
    assert status == 1
    lines = out.splitlines()
    assert lines[0] == "Wrong"
    table = next(i for i, line in enumerate(lines) if line.startswith("Ops on"))
    assert lines[table + 2].split()[:2] == ["rms_norm", "reference"]


def test_mistakes(vitfast):
    for words in (("--op", "attn"), ("--json", "/no/such/folder/x.json")):
        status, out, err = vitfast("check", *words)
        assert (status, out) == (2, "")
        assert len(err.splitlines()) == 1


def test_what_finds_no_time_is_named(vitfast, one_model, tmp_path):
    path = tmp_path / "check.json"
    status, out, _ = vitfast("check", "--minutes", "1e-9", "--json", path)
    assert status == 0
    assert "vit: test_vit: left out, out of time" in out
    assert json.loads(path.read_text())["left_out"] == ["vit: test_vit"] * 2
