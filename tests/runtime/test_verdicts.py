"""The files of verdicts: what makes one invalid, and what happens to bad and shared files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vitfast
from vitfast import ops
from vitfast.runtime import launches, verdicts
from vitfast.runtime.verdicts import FAILED, RIGHT, WRONG, Question, Verdict

CPU = torch.device("cpu")
ONE = Question("layer_norm", "float32", "forward")
TWO = Question("attention", "float16", "backward")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(launches, "LAUNCHES", tmp_path)
    verdicts._say_once.cache_clear()
    launches.reread_tables()
    yield
    launches.reread_tables()


def test_what_is_kept_is_known(tmp_path):
    found = {
        ONE: Verdict(RIGHT, problems=("a", "b"), speed=1.5),
        TWO: Verdict(WRONG, "out0 is off"),
    }
    verdicts.keep(CPU, found)
    assert verdicts.known(CPU) == found
    verdicts.keep(CPU, {ONE: Verdict(FAILED, "no answer")})
    assert verdicts.known(CPU) == {ONE: Verdict(FAILED, "no answer"), TWO: found[TWO]}
    assert verdicts.path_of(CPU).parent == tmp_path / "cache/vitfast/trust"
    assert not [p for p in verdicts.path_of(CPU).parent.iterdir() if p.suffix == ".tmp"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "7", '{"ops": {"layer_norm": {}}}',
     '{"ops": {"layer_norm": {"kernels": "x"}, "grn": 3}}'],
)  # fmt: skip
def test_a_file_that_cannot_be_read_holds_nothing(text, caplog):
    """It is said once, and replaced by the next verdict."""
    path = verdicts.path_of(CPU)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert verdicts.known(CPU) == verdicts.known(CPU) == {}
    assert caplog.text.count("cannot be read") == 1
    verdicts.keep(CPU, {ONE: Verdict(RIGHT)})
    assert verdicts.known(CPU) == {ONE: Verdict(RIGHT)}


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    verdicts.keep(CPU, {ONE: Verdict(RIGHT)})
    assert "hold for this process only" in caplog.text


def test_the_package_s_verdicts(tmp_path, monkeypatch):
    """They hold for their Triton and kernels; where this user's are worse, those count."""
    carried = {ONE: Verdict(RIGHT), TWO: Verdict(RIGHT)}

    def carry(**changes: str) -> None:
        document = verdicts.as_document(CPU, carried)
        document["machine"] |= changes
        table = {"kernels": {}, "verdicts": document}
        (tmp_path / "interpreter.json").write_text(json.dumps(table))

    carry(device="another of its kind", driver="another", torch="another")
    assert verdicts.known(CPU) == carried
    verdicts.keep(CPU, {ONE: Verdict(WRONG, "here")})
    assert verdicts.known(CPU) == {ONE: Verdict(WRONG, "here"), TWO: Verdict(RIGHT)}
    carry(triton="another")
    assert verdicts.known(CPU) == {ONE: Verdict(WRONG, "here")}


def test_two_processes_lose_no_verdict(tmp_path):
    """Each adds its own, many times, to one file."""
    code = (
        "import sys, torch\n"
        "from vitfast.runtime import verdicts\n"
        "for i in range(25):\n"
        "    q = verdicts.Question('grn', f'{sys.argv[1]}{i}', 'forward')\n"
        "    verdicts.keep(torch.device('cpu'), {q: verdicts.Verdict('right')})\n"
    )
    root = str(Path(vitfast.__file__).parents[1])
    running = [
        subprocess.Popen([sys.executable, "-c", code, name], cwd=root) for name in ("a", "b")
    ]
    assert [process.wait() for process in running] == [0, 0]
    assert len(verdicts.known(CPU)) == 50


def test_every_op_has_sources_of_its_own():
    """Its Triton files, and what they import: an edit of another op's is no concern of it."""
    specs = [spec for spec in ops.specs() if "triton" in spec.dispatcher.backends]
    sources = {spec.name: verdicts._sources(spec.name) for spec in specs}
    names = {op: {p.parent.name + "/" + p.name for p in found} for op, found in sources.items()}
    for op in sources:
        if op != "mlp":
            assert f"{op}/triton.py" in names[op]
    assert {"linear_act/triton_kernels.py", "grn/triton_kernels.py"} <= names["mlp"]
    assert "common/norm_triton_kernels.py" in names["add_norm"]
    assert "attention/triton_kernels_backward.py" in names["attention"]
    assert "common/triton_tiles.py" in names["grn"]
    assert not any(name.startswith("attention/") for name in names["layer_norm"])
    assert len({verdicts.kernels_of(op) for op in sources}) == len(sources)


def test_a_change_of_any_source_changes_the_hash(monkeypatch, tmp_path):
    import shutil

    shutil.copytree(verdicts._PACKAGE, tmp_path / "vitfast", ignore=shutil.ignore_patterns("*.so"))
    monkeypatch.setattr(verdicts, "_PACKAGE", tmp_path / "vitfast")
    verdicts.kernels_of.cache_clear()
    try:
        before = {op: verdicts.kernels_of(op) for op in ("layer_norm", "window_attention")}
        kernels = tmp_path / "vitfast/ops/window_attention/triton_kernels_large.py"
        kernels.write_text(kernels.read_text() + "\n")
        verdicts.kernels_of.cache_clear()
        after = {op: verdicts.kernels_of(op) for op in before}
        assert after["layer_norm"] == before["layer_norm"]
        assert after["window_attention"] != before["window_attention"]
    finally:
        verdicts.kernels_of.cache_clear()
