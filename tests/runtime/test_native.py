"""The native extension loads where it was built, and `VITFAST_CPU_ISA` can only lower its level."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from vitfast.errors import BackendUnavailableError
from vitfast.runtime import native
from vitfast.settings import ISA_LEVELS, settings

built = pytest.mark.skipif(native._load()[0] is None, reason="no native extension in this install")


def test_the_extension_is_built_where_there_is_a_compiler():
    if not any(shutil.which(c) for c in ("c++", "g++", "clang++")):
        pytest.skip("this machine has no C++ compiler")
    assert native.reasons() == []


@built
def test_levels_up_to_the_best_can_be_selected():
    best = native.native().best_isa()
    for level in ISA_LEVELS[: best + 1]:
        settings.cpu_isa = level
        assert native.isa() == level
    settings.cpu_isa = None
    assert native.isa() == ISA_LEVELS[best]


@built
def test_a_level_above_the_cpu_is_refused(monkeypatch):
    module = native.native()

    class Old:
        """The extension on a CPU without vector instructions."""

        def best_isa(self):
            return 0

        def select_isa(self, level):
            raise AssertionError("must not be asked for")

    monkeypatch.setattr(native, "_load", lambda: (Old(), ""))
    settings.cpu_isa = "avx2"
    with pytest.raises(BackendUnavailableError, match="'avx2'.*at most 'baseline'.*only lower"):
        native.native()
    monkeypatch.undo()
    settings.cpu_isa = None
    assert native.native() is module


@built
def test_disabling_is_a_reason():
    settings.disable = True
    assert native.reasons() == ["VITFAST_DISABLE is set"]


def test_a_missing_extension_says_why(monkeypatch):
    monkeypatch.setattr(native, "_load", lambda: (None, "native extension not built: no compiler"))
    assert native.reasons() == ["native extension not built: no compiler"]
    with pytest.raises(BackendUnavailableError, match="no compiler"):
        native.native()


@built
def test_calls_leave_no_thread_behind():
    code = """
import os, torch
torch.set_num_threads(2)
import vitfast.ops as ops
x = torch.randn(64, 197, 768)
torch.nn.functional.layer_norm(x, (768,))
before = len(os.listdir("/proc/self/task"))
for _ in range(100):
    ops.layer_norm(x[:8], backend="cpu")
print(before, len(os.listdir("/proc/self/task")))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, run.stdout.split())
    assert after <= max(before, 2)
