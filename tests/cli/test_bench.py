"""`vitfast bench`: tables, files, comparisons, and what a user gets wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from vitfast.bench import modules, suite, zoo

SHORT = ("--seconds", "0.01", "--no-memory")
MODEL = ("--model", "test_vit", "--img-size", "64", *SHORT)
PAIR = ("--model", "test_vit", "--model", "test_resnet")


def test_models(vitfast, tmp_path):
    path = tmp_path / "out.json"
    status, out, err = vitfast("bench", "models", *MODEL, "--json", path)
    assert (status, err) == (0, "")
    assert "test_vit" in out
    assert "error/budget" in out
    found = json.loads(path.read_text())
    assert found["rows"][0]["results"]["vitfast"]["median_ms"] > 0
    assert found["rows"][0]["shape"] == "1x3x64x64"
    assert found["floors"] == {"gflops": 100.0, "gbs": 10.0}
    assert {"versions", "cpu", "commit"} <= set(found["machine"])
    assert os.listdir(tmp_path) == ["out.json"]


def test_blocks_in_training_with_a_peer_that_cannot(vitfast):
    status, out, _ = vitfast(
        "bench", "blocks", *MODEL, "--pass", "train", "--batch", 2, "--peers", "eager,openvino"
    )
    assert status == 0
    assert "2x17x64" in out
    assert "openvino: inference only" in out


def test_one_op_of_a_model(vitfast):
    status, out, _ = vitfast("bench", "ops", *MODEL, "--op", "layer_norm", "--dtype", "bf16")
    assert status == 0
    assert "layer_norm test_vit #1" in out
    assert "bfloat16" in out
    assert "attention" not in out


def test_one_sample_by_name(vitfast):
    words = ("bench", "ops", "--op", "layer_norm", "--case", "prime_width", "--seconds", "0.01")
    status, out, _ = vitfast(*words)
    assert status == 0
    assert "3x5x13" in out


def test_compare_passes_and_fails(vitfast, tmp_path):
    path = tmp_path / "before.json"
    assert vitfast("bench", "models", *MODEL, "--json", path)[0] == 0
    found = json.loads(path.read_text())
    for ratio, status in ((1e-3, 0), (1e3, 1)):
        found["rows"][0]["ratios"] = {"eager": ratio}
        path.write_text(json.dumps(found))
        got, out, _ = vitfast("bench", "models", *MODEL, "--compare", path)
        assert got == status
        assert f"Against {path}" in out
        assert ("worse" in out) == (status == 1)
    found["rows"] = []
    path.write_text(json.dumps(found))
    got, out, _ = vitfast("bench", "models", *MODEL, "--compare", path)
    assert got == 0
    assert "has none of these cases" in out


def test_several_models_are_one_table(vitfast, tmp_path):
    path = tmp_path / "out.json"
    words = ("--model", "vit_tiny_patch16_224", *PAIR, "--model", "test_vit", *SHORT)
    status, out, err = vitfast("bench", "models", *words, "--json", path)
    assert (status, err) == (0, "")
    tiny, vit, resnet = (line.split() for line in out.splitlines()[2:5])
    assert tiny[:2] == ["vit_tiny_patch16_224", "1x3x224x224"]
    assert vit[:2] == ["test_vit", "1x3x160x160"]  # each at a size of its own, and once
    assert resnet[:2] == ["test_resnet", "1x3x160x160"]
    assert " (" in out.splitlines()[3] and "not swapped" not in out.splitlines()[3]
    assert "(" not in out.splitlines()[4] and "not swapped" in out.splitlines()[4]
    assert "nothing to replace in test_resnet\n" in out
    rows = json.loads(path.read_text())["rows"]
    assert [row["case"] for row in rows] == ["vit_tiny_patch16_224", "test_vit", "test_resnet"]
    assert rows[1]["ratios"].keys() == {"eager"} and rows[2]["ratios"] == {}
    assert rows[2]["results"]["eager"]["median_ms"] > 0
    assert rows[2]["results"]["vitfast"]["median_ms"] is None
    assert rows[2]["results"]["vitfast"]["reason"] == "not swapped"


def test_one_size_for_several_models(vitfast):
    status, out, _ = vitfast("bench", "models", *PAIR, *SHORT, "--img-size", "64x96")
    assert status == 0
    assert out.count("1x3x64x96") == 2


def test_a_model_that_is_not_swapped_by_itself_with_no_other_contender(vitfast):
    words = ("--model", "test_resnet", "--peers", "openvino", "--pass", "train", *SHORT)
    status, out, err = vitfast("bench", "models", *words)
    assert (status, err) == (0, "")
    assert "not swapped" in out
    assert "openvino: inference only" in out


@pytest.mark.parametrize(
    "words, case",
    [(("blocks",), "test_vit"), (("ops", "--op", "layer_norm"), "layer_norm test_vit #1")],
)
def test_a_model_without_blocks_leaves_the_others_alone(vitfast, tmp_path, words, case):
    path = tmp_path / "out.json"
    models = ("--model", "test_resnet", "--model", "test_vit")
    status, out, _ = vitfast("bench", *words, *models, *SHORT, "--json", path)
    assert status == 1
    assert case in out
    found = json.loads(path.read_text())
    assert [row["case"] for row in found["rows"]] == [case]
    assert "test_resnet has no list of blocks" in found["left_out"][0]
    assert found["left_out"][0] in out


@pytest.mark.parametrize("level", ["ops", "blocks", "models"])
def test_no_model_is_built_before_all_names_are_known(vitfast, monkeypatch, level):
    monkeypatch.setattr(zoo, "build", lambda *args, **kwargs: pytest.fail("built a model"))
    status, out, err = vitfast("bench", level, *PAIR, "--model", "vit_bse_patch16_224")
    assert (status, out) == (2, "")
    assert "timm has no model 'vit_bse_patch16_224'; did you mean vit_base_patch16_224" in err


def test_an_interrupt_keeps_the_models_that_are_done(vitfast, tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    measure = modules.measure

    def interrupted(case, *args, **kwargs):
        if case.name == "test_resnet":
            raise KeyboardInterrupt
        return measure(case, *args, **kwargs)

    monkeypatch.setattr(modules, "measure", interrupted)
    assert vitfast("bench", "models", *PAIR, *SHORT, "--json", path)[0] == 130
    assert [row["case"] for row in json.loads(path.read_text())["rows"]] == ["test_vit"]


def test_compare_goes_case_by_case(vitfast, tmp_path):
    path = tmp_path / "before.json"
    assert vitfast("bench", "models", *PAIR, *SHORT, "--json", path)[0] == 0
    found = json.loads(path.read_text())
    for ratios, status in (((1e-3, {}), 0), ((1e3, {}), 1), ((1e-3, {"eager": 2.0}), 1)):
        for row, kept in zip(found["rows"], ({"eager": ratios[0]}, ratios[1]), strict=True):
            row["ratios"] = kept
        path.write_text(json.dumps(found))
        got, out, _ = vitfast("bench", "models", *PAIR, *SHORT, "--compare", path)
        assert got == status
        rest = out.partition("Against")[2]
        assert "test_vit 1x3x160x160" in rest
        # Swapped once and not any more is a loss; never swapped is nothing to compare.
        assert ("not compared, no ratio in both files: test_resnet" in rest) == (not ratios[1])
        assert ("test_resnet 1x3x160x160" in rest) == bool(ratios[1])


@pytest.mark.parametrize(
    "words, message",
    [
        (("models", "--model", "vit_bse_patch16_224"), "did you mean vit_base_patch16_224"),
        (("blocks", "--model", "test_resnet", "--model", "resnet18"), "resnet18 has no list of"),
        (("models", "--img-size", "big"), "expected a size"),
        (("models", "--batch", "0"), "expected at least 1"),
        (("models", "--seconds", "0"), "expected a positive number"),
        (("models", "--seconds", "nan"), "expected a positive number"),
        (("models", "--peers", "tensorflow"), "no peer 'tensorflow'"),
        (("models", "--op", "attention"), "--op and --case go with"),
        (("models", "--json", "/no/such/folder/x.json"), "there is no folder"),
        (("models", "--compare", "/no/such/file.json"), "No such file"),
        (("blocks", "--model", "test_resnet", "--img-size", "64"), "no list of blocks"),
        (("blocks", "--model", "test_vit", "--img-size", "65"), "65"),
        (("ops", "--op", "attn"), "no op 'attn'"),
        (("ops", "--case", "none"), "nothing to time"),
        (("ops", "--img-size", "64"), "need --model"),
        (("ops", "--model", "test_vit", "--case", "x"), "leave out --model"),
        (("all",), "invalid choice"),
        (("--batch", "2"), "--batch needs a level"),
        (("--model", "test_vit"), "--model needs a level"),
        (("--minutes", "0"), "expected a positive number"),
        (("models", "--minutes", "1"), "without a level"),
    ],
)
def test_mistakes_are_one_line_and_status_2(vitfast, words, message):
    status, out, err = vitfast("bench", *words)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    if words != ("all",):
        assert len(err.splitlines()) == 1


def test_without_a_level_it_runs_the_set_of_the_machine(vitfast, monkeypatch, tmp_path):
    part = suite.Part("models", "test_vit", (64, 64))
    monkeypatch.setitem(suite.PARTS, "cpu", (part, suite.Part("ops", "test_vit", (65, 65))))
    path = tmp_path / "out.json"
    words = ("--seconds", "0.01", "--no-memory", "--device", "cpu", "--json", path)
    status, out, _ = vitfast("bench", *words)
    assert status == 0
    assert "test_vit" in out
    kept = json.loads(path.read_text())
    assert [row["level"] for row in kept["rows"]] == ["models"]
    assert "65" in kept["left_out"][0] and kept["left_out"][0] in out


@pytest.mark.gpu
def test_cuda(vitfast):
    assert vitfast("bench", "models", *MODEL, "--device", "cuda")[0] == 0


def test_an_interrupt_leaves_the_old_file(vitfast, tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    path.write_text("old")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(modules, "measure", interrupted)
    status, _, err = vitfast("bench", "models", *MODEL, "--json", path)
    assert (status, err) == (130, "vitfast: interrupted\n")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.json"]


def test_ctrl_c_in_the_middle_of_a_run(tmp_path):
    path = tmp_path / "out.json"
    words = ["bench", "models", *MODEL[:-3], "--seconds", "300", "--no-memory", "--json", str(path)]
    child = subprocess.Popen(
        [sys.executable, "-c",
         "import signal, sys, vitfast.bench.timer as t, vitfast.bench.modules as m\n"
         "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's job may ignore it
         "def endless(*a, **k):\n"
         "    print('timing', flush=True); return t.interleave(*a, **k, max_rounds=10**9)\n"
         "m.interleave = endless\n"
         "from vitfast.cli.main import main; sys.exit(main(sys.argv[1:]))", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert child.stdout.readline() == "timing\n"
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130
    assert err.endswith("vitfast: interrupted\n")
    assert os.listdir(tmp_path) == []
