"""Building and installing: with no compiler, with a broken one, what goes where, twice the same."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile

import pytest

import vitfast

BUILD_TOOLS = (
    all(importlib.util.find_spec(name) for name in ("setuptools", "pybind11", "pip"))
    and int(importlib.metadata.version("setuptools").partition(".")[0]) >= 77
)
needs_build_tools = pytest.mark.skipif(
    not BUILD_TOOLS, reason="setuptools 77, pip and pybind11 are needed to build without isolation"
)


@pytest.fixture
def source(tmp_path, root):
    """A copy of the checkout as git would give it: no build folder, no extension, no .git."""
    copy = tmp_path / "source"
    ignore = shutil.ignore_patterns(
        ".*", "build", "dist", "*.so", "*.egg-info", "__pycache__", "_build_info.py", "results"
    )
    shutil.copytree(root, copy, ignore=ignore)
    return copy


def pip(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if k not in ("CXX", "CMAKE_ARGS", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        env=environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | variables,
        capture_output=True,
        text=True,
        timeout=900,
    )


OFFLINE = ("--no-index", "--no-deps", "--no-build-isolation", "--quiet")


@needs_build_tools
def test_install_without_a_compiler_succeeds_and_says_so(source, tmp_path, python):
    site = tmp_path / "site"
    result = pip("install", *OFFLINE, "--target", str(site), str(source), CXX="/nowhere/c++")
    assert result.returncode == 0, result.stderr
    files = {f.relative_to(site).as_posix() for f in site.rglob("*") if f.is_file()}
    assert {"vitfast/__init__.py", "vitfast/py.typed", "vitfast/cli/info.py"} <= files
    info = f"vitfast-{vitfast.__version__}.dist-info"
    assert {f.split("/")[0] for f in files} == {"vitfast", info, "bin"}
    sources = {f for f in files if f.endswith((".so", ".cpp", ".h", ".cu"))}
    assert sources == {"vitfast/_cuda/dwconv.cu", "vitfast/_cuda/intrinsics.h"}  # for NVRTC

    reason = "native extension not built: no C++ compiler found (CXX=/nowhere/c++)"
    facts = json.loads(python("-m", "vitfast", "info", "--json", package=site).stdout)
    assert facts["location"] == str(site / "vitfast")
    assert facts["native"]["usable"] is False
    assert facts["native"]["reasons"] == [reason]
    assert facts["ops"]["layer_norm"]["cpu"] == [reason]
    code = """
import torch, vitfast
x = torch.randn(3, 8)
layer_norm = vitfast.ops.layer_norm
assert torch.equal(layer_norm(x, backend="auto"), layer_norm(x, backend="reference"))
layer_norm(x, backend="cpu")
"""
    result = python("-c", code, package=site, check=False)
    assert "BackendUnavailableError: layer_norm: backend 'cpu' was asked for" in result.stderr
    assert reason in result.stderr


@needs_build_tools
@pytest.mark.parametrize(
    "variables",
    [{"CXX": "/nowhere/c++", "CMAKE_ARGS": "-DVITFAST_CUDA=on"}],
    ids=["cuda asked for"],
)
def test_install_fails_where_a_feature_was_asked_for(source, tmp_path, variables):
    result = pip("install", *OFFLINE, "--target", str(tmp_path / "site"), str(source), **variables)
    assert result.returncode != 0
    assert "vitfast: no C++ compiler found" in result.stderr + result.stdout


@needs_build_tools
def test_building_in_place_without_a_compiler_is_an_error(source):
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=source,
        env=os.environ | {"CXX": "/nowhere/c++"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr.endswith("vitfast: no C++ compiler found (CXX=/nowhere/c++)\n")


@needs_build_tools
def test_source_distribution_holds_all_sources_and_no_product(source, tmp_path):
    (source / "vitfast" / "_native.cpython-311-x86_64-linux-gnu.so").write_bytes(b"stale")
    (source / "vitfast" / "_build_info.py").write_text("NATIVE_STATUS = 'stale'\n")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path / "dist")],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    here = {
        f.relative_to(source).as_posix()
        for folder in ("csrc", "vitfast", "tests")
        for f in (source / folder).rglob("*")
        if f.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".map", ".md", ".json")
    }
    here.discard("vitfast/_build_info.py")
    missing = here - names
    assert not missing
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    assert not [n for n in names if n.endswith((".so", ".pyc", "_build_info.py"))]


@needs_build_tools
@pytest.mark.skipif(not all(map(shutil.which, ("cmake", "ninja"))), reason="needs cmake and ninja")
def test_install_with_a_broken_compiler_quotes_its_error(source, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'fatal error: out of cheese' >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    site = tmp_path / "site"
    result = pip("install", *OFFLINE, "--target", str(site), str(source), CXX=str(compiler))
    assert result.returncode == 0, result.stderr
    status = (site / "vitfast" / "_build_info.py").read_text()
    assert re.search(r"NATIVE_STATUS = .cmake failed: .*compiler", status)


@pytest.mark.slow
@needs_build_tools
@pytest.mark.skipif(not all(map(shutil.which, ("cmake", "ninja"))), reason="needs cmake and ninja")
def test_two_builds_give_the_same_wheel(source, tmp_path):
    digests = set()
    for name in ("first", "second"):
        folder = tmp_path / name  # another path: none may end up in the wheel
        shutil.copytree(source, folder)
        to = ("-w", str(folder / "out"))
        result = pip("wheel", *OFFLINE, *to, str(folder), SOURCE_DATE_EPOCH="1700000000")
        assert result.returncode == 0, result.stderr
        (wheel,) = (folder / "out").iterdir()
        names = zipfile.ZipFile(wheel).namelist()
        assert any(n.startswith("vitfast/_native") for n in names)
        assert not [n for n in names if n.startswith(("csrc", "tests", "benchmarks"))]
        digests.add(hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert len(digests) == 1


# ---- metadata -----------------------------------------------------------------------------------


def test_version_is_the_same_everywhere(root):
    project = (root / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.*)"$', project, re.M)[1] == vitfast.__version__
    assert f"## [{vitfast.__version__}]" in (root / "CHANGELOG.md").read_text()


def test_every_kernel_is_compiled(root):
    listed = set(re.findall(r"csrc/\S+\.cpp", (root / "CMakeLists.txt").read_text()))
    there = {f.relative_to(root).as_posix() for f in (root / "csrc").rglob("*.cpp")}
    assert listed == there


def test_build_needs_no_torch(root):
    project = (root / "pyproject.toml").read_text()
    requires = re.search(r"^requires = \[(.*)\]$", project, re.M)[1]
    assert "torch" not in requires
    for line in (root / "setup.py").read_text().splitlines():
        assert not re.match(r"\s*(import|from) (torch|numpy|timm|vitfast|urllib|requests)\b", line)
