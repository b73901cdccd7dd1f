"""`vitfast prove`: what it asks, what it keeps, and that a run that is ended has lost nothing done.

Its workers are stand-ins but in tests/interpreter/test_prove.py.
"""

from __future__ import annotations

import json
import sys

import pytest
import torch

from vitfast.check import prove
from vitfast.cli.main import main
from vitfast.runtime import launches, triton, trust, verdicts
from vitfast.runtime.verdicts import FAILED, RIGHT, WRONG, Question

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FAKE = """
import json, os, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    do = task["do"]
    op = task.get("op") or task.get("problem", {}).get("op")
    if op == "grn" and do == "judge":
        os._exit(9)
    found = {"state": "right", "reason": "", "broken": False}
    if do == "judge":
        found["error_over_budget"] = 0.5
    if op == "rms_norm" and do == "check":
        found = {"state": "wrong", "reason": "repeat 1 of 3 differs"}
    if do == "time":
        found = {"seconds": {"triton": 1.0, "reference": 2.0}, "asked": [], "reason": ""}
    if do == "model":
        if SLOW:
            time.sleep(1000)
        found["row"] = {"ratios": {"eager": 1.25}}
    print(json.dumps(found), flush=True)
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prove, "COMMAND", (sys.executable, "-c", FAKE.replace("SLOW", "False")))
    trust.forget()
    launches.reread_tables()
    yield
    trust.forget()
    launches.reread_tables()


def run(tmp_path, *ops: str, seconds: float = 300.0) -> tuple[prove.Record, dict]:
    kept = prove.prove(CPU, tmp_path, ops, seconds, lambda text: None)
    return kept, json.loads((tmp_path / "prove.json").read_text())


def test_every_stage_is_kept(tmp_path):
    kept, found = run(tmp_path, "layer_norm", "rms_norm")
    assert found["kind"] == "vitfast prove" and found["finished"] and found["left_out"] == []
    assert [item["stage"] for item in found["items"]] == sorted(
        (item["stage"] for item in found["items"]), key=list(prove.SHARES).index
    )
    assert {item["stage"] for item in found["items"]} == set(prove.SHARES)
    known = verdicts.known(CPU)
    assert known[Question("layer_norm", "float32", "backward")].state == RIGHT
    ratios = {(name, ratio) for _, name, ratio in prove.ratios(kept)}
    assert ratios == {("reference", "2.00x"), ("eager", "1.25x")}
    assert not prove.is_right(kept)  # the check of rms_norm
    summary = {stage: (wrong, left) for stage, _, wrong, left in prove.summary(kept)}
    assert summary == {
        "selftest": ("0", "0"), "hardware": ("2", "0"), "kernels": ("0", "0"), "models": ("0", "0"),
    }  # fmt: skip
    table = json.loads((tmp_path / "interpreter.json").read_text())
    assert "layer_norm" in table["verdicts"]["ops"] and "kernels" in table


def test_an_op_that_kills_its_worker_costs_itself_only(tmp_path):
    kept, _ = run(tmp_path, "grn", "layer_norm")
    states = {(i["name"].split()[0], i["state"]) for i in kept.items if i["stage"] == "selftest"}
    assert states == {("grn", FAILED), ("layer_norm", RIGHT)}
    known = verdicts.known(CPU)
    assert known[Question("grn", "float32", "forward")].state == FAILED
    assert prove.is_right(kept)  # nothing that ran gave a wrong number


def test_the_end_comes_by_the_clock(tmp_path, monkeypatch):
    """An item in progress is ended; what was done before it stays."""
    monkeypatch.setattr(prove, "COMMAND", (sys.executable, "-c", FAKE.replace("SLOW", "True")))
    monkeypatch.setattr(prove, "SHARES", {"selftest": 0.5, "models": 0.5})
    kept, found = run(tmp_path, "layer_norm", seconds=40.0)
    assert found["finished"] and kept.left_out == [
        f"models: {prove.items(CPU, [], 'models')[0].name}"
    ]
    assert {item["stage"] for item in found["items"]} == {"selftest"}


def test_an_exact_result_is_kept(tmp_path):
    """An error of 0 is one, and no absence."""
    kept = prove.Record(tmp_path, {})
    (item, *_) = prove.items(CPU, ["patch_merge"], "selftest")
    kept.add(item, {"state": RIGHT, "error_over_budget": 0.0, "reason": "", "broken": False}, 1.0)
    (found,) = json.loads((tmp_path / "prove.json").read_text())["items"]
    assert found["error_over_budget"] == 0.0 and "reason" not in found and "broken" not in found


def test_no_time_leaves_everything_out(tmp_path):
    kept, found = run(tmp_path, "layer_norm", seconds=1e-6)
    assert found["items"] == [] and len(found["left_out"]) > 4 and found["finished"]
    assert verdicts.known(CPU) == {}


def test_an_unfinished_question_has_no_right_verdict():
    """What was wrong counts at once, what was right only if all of it was."""
    todo = prove.items(CPU, ["layer_norm"], "selftest")
    right = {"state": RIGHT, "reason": ""}
    everything = dict.fromkeys(range(len(todo)), right)
    assert {v.state for v in prove._verdicts(todo, everything).values()} == {RIGHT}
    assert len(prove._verdicts(todo, everything)) == 2
    assert prove._verdicts(todo, {0: right}) == {}
    found = prove._verdicts(todo, {0: {"state": WRONG, "reason": "off"}})
    assert [v.state for v in found.values()] == [WRONG]


def test_what_a_gpu_is_asked():
    """Every op, dtype and pass; bfloat16 first, which the interpreter cannot; then what gains."""
    names = prove.ops_named(None)
    todo = prove.items(GPU, names, "selftest")
    assert (
        {item.question.op for item in todo}
        == set(names)
        == set(prove.GAINING) | {"rms_norm", "mlp"}
    )
    first = [item.question.dtype for item in todo]
    assert first == sorted(first, key=prove.DTYPES.index) and set(first) == set(prove.DTYPES)
    checks = prove.items(GPU, names, "hardware")
    kinds = {" ".join(item.task["name"].split()[:1]) for item in checks}
    assert kinds == {"determinism", "streams", "graph", "out", "2^31", "random"}
    assert [item.task["op"] for item in checks[: len(names)]] == names
    assert prove.items(GPU, names, "kernels")[0].question.op == "window_attention"
    models = prove.items(GPU, names, "models")
    assert {item.task["model"].split("_")[0] for item in models} >= {"vit", "swin", "convnext"}
    assert any(item.task["size"] == (2160, 3840) for item in models)
    assert sum(prove.SHARES.values()) == pytest.approx(1.0)


def test_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(triton, "available", list)
    folder = tmp_path / "new" / "folder"
    assert main(["prove", "--json", str(folder), "--op", "layer_norm", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Stages") and "Time over vitfast's" in out
    assert json.loads((folder / "prove.json").read_text())["finished"]


@pytest.mark.parametrize(
    ("words", "why"),
    [(["--seconds", "0"], "positive"), (["--seconds", "nan"], "positive"),
     (["--op", "attn"], "attn"), ([], "there is no GPU")],
)  # fmt: skip
def test_mistakes_are_one_line(monkeypatch, tmp_path, capsys, words, why):
    monkeypatch.setattr(triton, "available", lambda: ["there is no GPU"])
    assert main(["prove", "--json", str(tmp_path / "x"), *words]) == 2
    err = capsys.readouterr().err
    assert why in err and len(err.splitlines()) == 1


def test_a_folder_that_cannot_be_made(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(triton, "available", list)
    (tmp_path / "file").write_text("")
    assert main(["prove", "--json", str(tmp_path / "file" / "x")]) == 2
    assert "--json" in capsys.readouterr().err
