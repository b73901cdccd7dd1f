"""The `vitfast` command: arguments, exit status, errors, and `vitfast info`."""

from __future__ import annotations

import json
import sys
import types

import pytest

from vitfast.cli import info, main
from vitfast.errors import InputValueError
from vitfast.runtime import native
from vitfast.settings import BACKENDS, ENVIRONMENT, settings


@pytest.fixture
def command(monkeypatch):
    """Replaces `vitfast check` by a function."""

    def install(function):
        module = types.ModuleType("vitfast.cli.check")
        module.add_arguments = lambda parser: parser.add_argument("--size", type=int, default=1)
        module.run = function
        monkeypatch.setitem(sys.modules, "vitfast.cli.check", module)

    return install


@pytest.mark.parametrize("status", [0, 1])
def test_status_is_that_of_the_sub_command(command, status):
    command(lambda args: status * args.size)
    assert main.main(["check"]) == status
    assert main.main(["check", "--size", "3"]) == 3 * status


@pytest.mark.parametrize(
    "error", [InputValueError("no such model 'vit_hug'"), FileNotFoundError(2, "No file", "a.jpg")]
)
def test_expected_errors_are_one_line_and_status_2(command, capsys, error):
    def fail(args):
        raise error

    command(fail)
    assert main.main(["check"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"vitfast: error: {error}\n")


def test_a_bug_keeps_its_traceback(command):
    def fail(args):
        raise ZeroDivisionError

    command(fail)
    with pytest.raises(ZeroDivisionError):
        main.main(["check"])


def test_interrupt_is_status_130(command, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    command(interrupt)
    assert main.main(["check"]) == 130
    assert capsys.readouterr().err == "vitfast: interrupted\n"


@pytest.mark.parametrize("argv", [[], ["frobnicate"], ["info", "--frobnicate"], ["--frobnicate"]])
def test_bad_usage_is_status_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main.main(argv)
    assert caught.value.code == 2
    assert "usage: vitfast" in capsys.readouterr().err


def test_help_names_every_command_and_loads_none(python):
    code = (
        "import sys\nfrom vitfast.cli.main import main\n"
        "try: main(['--help'])\nfinally: print([m for m in sys.modules if m == 'torch'])"
    )
    out = python("-c", code).stdout
    assert all(name in out for name in main.COMMANDS)
    assert out.endswith("[]\n")


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main.main([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: vitfast {name}" in capsys.readouterr().out


def test_version(python):
    import vitfast

    assert python("-m", "vitfast", "--version").stdout == f"vitfast {vitfast.__version__}\n"


@pytest.mark.parametrize("variable", ENVIRONMENT.values())
def test_a_bad_variable_is_one_line(python, variable):
    result = python("-m", "vitfast", "info", check=False, **{variable: "nosuch"})
    start = f"vitfast: error: environment variable {variable}='nosuch': expected one of "
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith(start) and result.stderr.count("\n") == 1


# ---- info ---------------------------------------------------------------------------------------


def test_info_json_covers_every_op_and_backend(capsys):
    from vitfast import ops

    assert main.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts["ops"]) == list(ops.NAMES)
    for spec in ops.specs():
        row = facts["ops"][spec.name]
        assert set(row) >= {*BACKENDS[1:], *spec.dispatcher.backends}
        assert row["reference"] == []
        for name, backend in spec.dispatcher.backends.items():
            assert row[name] == backend.available()
        assert all(reason for reasons in row.values() for reason in reasons)
    assert set(facts["settings"]) == set(ENVIRONMENT)
    assert facts["versions"]["torch"] and facts["versions"]["vitfast"]


def test_info_for_people_shows_every_reason(capsys):
    assert main.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert main.main(["info"]) == 0
    out = capsys.readouterr().out
    for op, backends in facts["ops"].items():
        assert op in out
        for reason in sum(backends.values(), []):
            assert reason in out


def test_info_tells_where_settings_come_from(python):
    result = python("-m", "vitfast", "info", "--json", VITFAST_LOG="error", VITFAST_DISABLE="1")
    facts = json.loads(result.stdout)
    assert facts["settings"]["log"]["source"] == "VITFAST_LOG"
    assert facts["settings"]["disable"] == {
        "value": True, "source": "VITFAST_DISABLE", "variable": "VITFAST_DISABLE",
    }  # fmt: skip
    assert facts["settings"]["backend"]["source"] == "default"
    assert facts["native"]["reasons"] == ["VITFAST_DISABLE is set"]
    text = python("-m", "vitfast", "info", VITFAST_DISABLE="1").stdout
    assert text.startswith("vitfast is disabled")


def test_info_reports_an_instruction_set_this_cpu_lacks(monkeypatch):
    if native.reasons():
        pytest.skip(native.reasons()[0])
    monkeypatch.setattr(native, "_load", lambda: (types.SimpleNamespace(best_isa=lambda: 0), ""))
    monkeypatch.setattr(native, "_applied_isa", "stale")
    monkeypatch.setattr(settings, "cpu_isa", "avx2")
    facts = info.native_facts()
    assert not facts["usable"]
    assert "can only lower" in facts["reasons"][0]


def test_info_in_a_closed_pipe_is_quiet(python):
    code = (
        "import subprocess, sys\n"
        "p = subprocess.Popen([sys.executable, '-m', 'vitfast', 'info'], stdout=subprocess.PIPE,"
        " stderr=subprocess.PIPE)\n"
        "p.stdout.close()\nprint(p.stderr.read(), p.wait())"
    )
    assert python("-c", code).stdout == "b'' 141\n"
