"""Settings come from the environment, are checked, and can be changed from Python."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from vitfast.errors import InputValueError
from vitfast.settings import BACKENDS, ENVIRONMENT, ISA_LEVELS, Settings


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
            "VITFAST_WEIGHTS": "frozen",
            "VITFAST_MEMORY": "low",
            "VITFAST_TRUST": "cached",
        }
    )
    assert settings.backend == "reference" and settings.disable is True
    assert settings.cpu_isa == "avx2"
    assert (settings.weights, settings.memory, settings.trust) == ("frozen", "low", "cached")
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
    [
        ("VITFAST_DISABLE", "maybe"),
        ("VITFAST_CPU_ISA", "sse9"),
        ("VITFAST_LOG", "shout"),
        ("VITFAST_BACKEND", "nosuch"),
    ],
)
def test_bad_values_are_refused_and_named(variable, raw):
    with pytest.raises(InputValueError, match=f"{variable}.*{raw}"):
        Settings.from_environment({variable: raw})


def test_attributes_are_checked_as_variables_are():
    settings = Settings.from_environment({})
    for value, meant in (("yes", True), ("no", False), (1, True), (False, False), ("0", False)):
        settings.disable = value
        assert settings.disable is meant


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("disable", None, "True, False"),
        ("disable", 2, "True, False"),
        ("disable", "maybe", "True, False"),
        ("backend", "nosuch", ", ".join(BACKENDS)),
        ("backend", None, ", ".join(BACKENDS)),
        ("cpu_isa", "sse9", ", ".join(ISA_LEVELS)),
        ("log", "shout", "debug, info, warning"),
        ("log", 17, "debug, info, warning"),
        ("weights", "watched", "watch, verify, frozen"),
        ("memory", "small", "speed, low"),
        ("trust", "always", "never, cached, test"),
    ],
)
def test_bad_values_are_refused_with_those_allowed(name, value, allowed):
    settings = Settings.from_environment({})
    before = getattr(settings, name)
    with pytest.raises(InputValueError, match=f"{name}={value!r}: expected one of {allowed}"):
        setattr(settings, name, value)
    assert getattr(settings, name) == before and settings.source[name] == "default"


def test_unknown_names_are_refused_with_the_nearest(monkeypatch):
    import vitfast.settings as module

    for settings in (Settings.from_environment({}), module):
        with pytest.raises(AttributeError, match="no setting 'bakend'; did you mean 'backend'"):
            settings.bakend = "cpu"
        with pytest.raises(AttributeError, match="no setting 'Disabled'; did you mean 'disable'"):
            settings.Disabled  # noqa: B018
        with pytest.raises(AttributeError, match="there are backend, disable, cpu_isa, log"):
            settings.qqq = 1


def test_every_backend_of_an_op_is_a_setting():
    from vitfast.ops import specs

    assert {name for spec in specs() for name in spec.dispatcher.backends} <= set(BACKENDS)


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


LOGGING = """
import logging, sys
import vitfast.settings

def configure():
    {configure}

if {first}:
    configure()
vitfast.settings.log = "debug"
vitfast.settings.log = "info"
if not {first}:
    configure()
vitfast.settings.logger.debug("too low")
vitfast.settings.logger.info("hello")
assert not [h for h in logging.getLogger().handlers if type(h).__module__ == "vitfast.settings"]
"""


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("configure", "lines"),
    [
        ("pass", 1),
        ("logging.basicConfig()", 1),
        ("logging.basicConfig(level=logging.ERROR)", 1),
        ("logging.getLogger().addHandler(logging.NullHandler())", 1),
        ("logging.getLogger('vitfast').addHandler(logging.StreamHandler())", 1),
        ("logging.basicConfig(); logging.getLogger('vitfast').propagate = False", 1),
        ("logging.basicConfig(); logging.getLogger().handlers[0].setLevel('ERROR')", 1),
        ("logging.getLogger('vitfast').setLevel('ERROR')", None),
    ],
)
def test_a_line_is_logged_once_however_logging_is_configured(configure, lines, first):
    """Our handler speaks only where no other on the way up does, and never joins the root's."""
    found = subprocess.run(
        [sys.executable, "-c", LOGGING.format(configure=configure, first=first)],
        env=_python_path(),
        capture_output=True,
        text=True,
        check=True,
    )
    if lines is None:  # whoever sets the level last, wins
        lines = 1 if first else 0
    assert found.stderr.count("hello") == lines and "too low" not in found.stderr


def test_clearing_the_level_gives_the_logger_back(monkeypatch):
    logger = logging.getLogger("vitfast")
    monkeypatch.setattr(logger, "handlers", list(logger.handlers))
    level, handlers = logger.level, list(logger.handlers)
    settings = Settings.from_environment({})
    settings.log = "Debug"
    assert logger.level == logging.DEBUG and len(logger.handlers) == len(handlers) + 1
    settings.log = None
    assert logger.level == level == logging.NOTSET and logger.handlers == handlers


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


def _python_path():
    return {"PYTHONPATH": ":".join(p for p in sys.path if p)}
