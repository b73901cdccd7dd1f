"""The numerics tests again on every instruction set that this CPU has, each in its own process.

There malloc fills memory with garbage, so that scratch memory which a kernel reads before it wrote
it shows too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitfast.runtime import native
from vitfast.settings import ISA_LEVELS

TESTS = Path(__file__).with_name("test_generic_numerics.py")


def _levels() -> list[str]:
    return [] if native.reasons() else list(ISA_LEVELS[: native.native().best_isa() + 1])


@pytest.mark.in_a_process
@pytest.mark.parametrize("level", _levels())
def test_numerics_of_checked_samples(level):
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider",
            "-m", "check and not slow", "-k", "test_forward or test_gradients", str(TESTS),
        ],
        env=os.environ | {"VITFAST_CPU_ISA": level, "MALLOC_PERTURB_": "90"},
        capture_output=True,
        text=True,
        timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout
