"""What must not be in the source: stray environment variables, and ways to run foreign code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    f
    for folder in ("vitfast", "benchmarks")
    for f in (ROOT / folder).rglob("*.py")
    if f.name != "_build_info.py"
)
READS_ENVIRONMENT = ("vitfast/settings.py",)
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FORBIDDEN_CALLS = {
    "eval", "exec", "torch.load", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load",
    "torch.hub.load", "subprocess.getoutput",
}  # fmt: skip


def findings(source: str, may_read_environment: bool = False) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Attribute, ast.Name)):
            name = ast.unparse(node)
            if name in ("os.environ", "os.getenv", "os.putenv") and not may_read_environment:
                yield f"{node.lineno}: {name}"
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "os" and not may_read_environment:
                names += [a.name for a in node.names if a.name in ("environ", "getenv")]
        else:
            names = []
        for name in names:
            if name.split(".")[0] in FORBIDDEN_MODULES | {"environ", "getenv"}:
                yield f"{node.lineno}: import {name}"
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in FORBIDDEN_CALLS:
                yield f"{node.lineno}: {ast.unparse(node.func)}"
            for keyword in node.keywords:
                risky = keyword.arg in ("shell", "trust_remote_code")
                if risky and ast.unparse(keyword.value) != "False":
                    yield f"{node.lineno}: {ast.unparse(keyword)}"


@pytest.mark.parametrize("file", FILES, ids=[str(f.relative_to(ROOT)) for f in FILES])
def test_source_is_clean(file):
    reads = file.relative_to(ROOT).as_posix() in READS_ENVIRONMENT
    assert list(findings(file.read_text(), reads)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.environ['X']",
        "import os\nos.getenv('X')",
        "from os import environ",
        "import torch\ntorch.load('x')",
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "exec('1')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "f(trust_remote_code=flag)",
    ],
)
def test_the_gate_rejects(source):
    assert list(findings(source))


def test_the_gate_accepts_what_only_looks_alike():
    assert list(findings("model.eval()\nf(shell=False)\n# torch.load(x)")) == []


def test_native_code_reads_no_environment():
    sources = [f for f in (ROOT / "csrc").rglob("*") if f.suffix in (".cpp", ".h", ".cu", ".cuh")]
    assert sources
    assert [f.name for f in sources if re.search(r"\bgetenv\b|\bsystem\s*\(", f.read_text())] == []


def test_no_kernel_knows_python_and_nothing_knows_torch():
    for file in (ROOT / "csrc").rglob("*"):
        if file.suffix not in (".cpp", ".h", ".cu", ".cuh"):
            continue
        included = re.findall(r"#include\s*[<\"]([^>\"]+)", file.read_text())
        assert not [i for i in included if i.startswith(("torch", "ATen", "c10"))], file
        if file.parent != ROOT / "csrc" / "bindings":
            assert not [i for i in included if i.startswith("pybind11") or i == "Python.h"], file


def test_few_environment_variables():
    from vitfast.settings import ENVIRONMENT

    assert len(ENVIRONMENT) <= 7
    named = set()
    for file in FILES:
        named |= set(re.findall(r"\bVITFAST_[A-Z_]+\b", file.read_text()))
    assert named == set(ENVIRONMENT.values())
