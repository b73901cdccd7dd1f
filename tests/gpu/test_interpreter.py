"""Runs tests/interpreter in processes of their own: Triton decides at its import to interpret."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
SHARDS = 4


@pytest.mark.in_a_process
@pytest.mark.parametrize("shard", range(1, SHARDS + 1))
def test_kernels_in_the_interpreter(shard):
    """The shards are as many, so that runners with several workers can spread them."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-rs", "-p", "no:cacheprovider", "--no-header",
         "tests/interpreter", f"--shard={shard}/{SHARDS}"],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    if "cannot run on this NumPy" in done.stdout:
        pytest.skip("this Triton's interpreter cannot run on this NumPy")
    assert " passed" in done.stdout
