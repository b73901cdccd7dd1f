"""Settings come from the environment, are checked, and can be changed from Python."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from vitfast.errors import InputValueError
from vitfast.settings import ENVIRONMENT, ISA_LEVELS, Settings


def test_defaults():
    settings = Settings.from_environment({})
    assert (settings.backend, settings.disable, settings.cpu_isa) == ("auto", False, None)
    assert set(settings.source.values()) == {"default"}
    assert set(settings.source) == set(ENVIRONMENT)


def test_every_variable_is_read_and_its_source_known():
    settings = Settings.from_environment(
        {
            "VITFAST_BACKEND": "reference",
            "VITFAST_DISABLE": "1",
            "VITFAST_CPU_ISA": "avx2",
            "VITFAST_LOG": "warning",
        }
    )
    assert settings.backend == "reference" and settings.disable is True
    assert settings.cpu_isa == "avx2"
    assert settings.source == ENVIRONMENT


def test_an_attribute_wins_over_the_environment_and_is_marked():
    settings = Settings.from_environment({"VITFAST_BACKEND": "reference"})
    settings.backend = "cpu"
    assert settings.backend == "cpu"
    assert settings.source["backend"] == "python"
    assert settings.source["disable"] == "default"


@pytest.mark.parametrize(
    ("raw", "value"), [("1", True), ("true", True), ("ON", True), ("0", False), ("no", False)]
)
def test_flags(raw, value):
    assert Settings.from_environment({"VITFAST_DISABLE": raw}).disable is value


@pytest.mark.parametrize(
    ("variable", "raw"),
    [("VITFAST_DISABLE", "maybe"), ("VITFAST_CPU_ISA", "sse9"), ("VITFAST_LOG", "shout")],
)
def test_bad_values_are_refused_and_named(variable, raw):
    with pytest.raises(InputValueError, match=raw):
        Settings.from_environment({variable: raw})


def test_an_empty_variable_is_unset():
    settings = Settings.from_environment({"VITFAST_CPU_ISA": "", "VITFAST_BACKEND": ""})
    assert settings.cpu_isa is None and settings.backend == "auto"


def test_isa_can_be_set_and_cleared():
    settings = Settings.from_environment({})
    for level in (*ISA_LEVELS, None):
        settings.cpu_isa = level
        assert settings.cpu_isa == level
    with pytest.raises(InputValueError, match="avx513"):
        settings.cpu_isa = "avx513"
    assert settings.cpu_isa is None


def test_log_level_reaches_the_logger_once():
    logger = logging.getLogger("vitfast")
    level, handlers = logger.level, list(logger.handlers)
    try:
        settings = Settings.from_environment({})
        settings.log = "debug"
        settings.log = "info"
        assert logger.level == logging.INFO
        streams = [h for h in logger.handlers if isinstance(h, logging.StreamHandler)]
        assert len(streams) == 1
    finally:
        logger.setLevel(level)
        logger.handlers[:] = handlers


def test_the_process_reads_its_environment():
    code = (
        "from vitfast.settings import settings; print(settings.backend, settings.source['backend'])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"VITFAST_BACKEND": "vendor", **_python_path()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == ["vendor", "VITFAST_BACKEND"]


def test_a_bad_variable_stops_the_import_with_a_clear_message():
    found = subprocess.run(
        [sys.executable, "-c", "import vitfast.settings"],
        env={"VITFAST_CPU_ISA": "mmx", **_python_path()},
        capture_output=True,
        text=True,
    )
    assert found.returncode != 0
    assert "cpu_isa='mmx'" in found.stderr and "avx2" in found.stderr


def _python_path():
    return {"PYTHONPATH": ":".join(p for p in sys.path if p)}
