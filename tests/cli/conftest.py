"""The command line in this process, with ceilings that need no measuring."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vitfast.bench import machine
from vitfast.cli.main import main


@pytest.fixture(autouse=True)
def ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gemm_gflops", lambda device, dtype: 100.0)
    monkeypatch.setattr(machine, "copy_gbs", lambda device: 10.0)


@pytest.fixture
def vitfast(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `vitfast ...`; gives exit status, stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        output = capfd.readouterr()
        return status, output.out, output.err

    return run
