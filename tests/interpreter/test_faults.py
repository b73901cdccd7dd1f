"""Faults planted in the kernels' source: each must be caught by the error criterion.

A copy of the package gets one textual change and judges one sample in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vitfast

PACKAGE = Path(vitfast.__file__).parent
JUDGE = """
import sys, torch
from vitfast import ops
from vitfast.testing.cases import Case
from vitfast.testing.errors import raise_if_wrong
op, sample = sys.argv[1:]
spec = ops.spec_of(op)
case = Case(spec, next(s for s in spec.samples if s.name == sample), torch.float32)
raise_if_wrong(case.judge(case.outputs(backend="triton")))
raise_if_wrong(case.judge_gradients(case.gradients(case.trained, backend="triton")))
print("right")
"""


def judge(package: Path, op: str, sample: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", JUDGE, op, sample],
        env={**os.environ, "PYTHONPATH": str(package.parent), "TRITON_INTERPRET": "1"},
        cwd=package.parent,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copytree(PACKAGE, tmp_path / "vitfast", symlinks=True))
