"""Fixtures for tests that start processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vitfast

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def python(tmp_path):
    """Runs Python in an empty folder with the vitfast under test and none of its variables set.

    `python("-c", code, VITFAST_LOG="info")` gives the CompletedProcess; `check=False` lets it fail.
    """

    def run(*arguments: str, check: bool = True, package: Path | None = None, **variables: str):
        environ = {k: v for k, v in os.environ.items() if not k.startswith("VITFAST_")}
        environ["PYTHONPATH"] = str(package or Path(vitfast.__file__).parents[1])
        result = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environ | variables,
            capture_output=True,
            text=True,
            timeout=240,
        )
        if check:
            assert result.returncode == 0, result.stderr
        return result

    return run
