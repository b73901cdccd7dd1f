"""Tables and paragraphs on terminals of several widths, and in files."""

from __future__ import annotations

import re

import pytest

from vitfast.cli import table
from vitfast.demo import showcase

TITLE = "timm beside vitfast, on a machine with a name that is longer than a terminal is wide: 96c"
HEADER = ("model", "dtype", "timm", "vitfast", "faster", "MB timm", "MB vitfast", "error", "top-5")
ROWS = [
    ("vit_base_patch16_224 @ 1024x2048", "float32", "123.4 ms", "61.2 ms", "2.01x", "1,230", "400",
     "1.2e-06 OVER", "5 of 5"),
    ("convnext_tiny.fb_in22k_ft_in1k @ 224", "bfloat16", "7.40 s", "183 us", "40.4x", "12", "4",
     "1.2e-06", "-"),
]  # fmt: skip
PROSE = [
    ("vit_tiny_patch16_224 @ 224", "12 Block: a reason that takes several lines, " * 4),
    ("test_vit @ 64", "short"),
]


@pytest.fixture(params=[60, 80, 120])
def width(request, monkeypatch):
    """A terminal; text is plain, as a terminal without colours shows it."""
    monkeypatch.setattr(table, "_on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", str(request.param))
    monkeypatch.setenv("NO_COLOR", "1")
    return request.param


def shown(capsys) -> list[str]:
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()


@pytest.mark.parametrize(
    ("header", "rows"), [(HEADER, ROWS), (("model", "reason"), PROSE), (("", ""), PROSE)]
)
def test_no_line_is_too_long_and_no_word_is_broken(width, header, rows, capsys):
    table.print_table(TITLE, header, rows)
    table.print_text(TITLE)
    lines = shown(capsys)
    assert max(map(len, lines)) <= width
    words = " ".join(lines).replace(",", " ").split()
    for text in (TITLE, *header[1:], *(cell for row in rows for cell in row)):
        assert set(text.replace(",", " ").split()) <= {*words, *(w.rstrip(":") for w in words)}


def test_a_table_that_fits_stays_a_table(width, capsys):
    table.print_table("Title", ("a", "b", ""), [("1.23 ms", "2", "")])
    assert shown(capsys) == ["Title", "  a        b", "  1.23 ms  2", ""]


def test_a_row_that_cannot_fit_becomes_a_paragraph(monkeypatch, capsys):
    monkeypatch.setattr(table, "_on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    table.print_table("Title", ("model", "time", "", "note"), [("x" * 36, "1 ms", "worse", "ok")])
    want = ["Title", "  " + "x" * 36, "    time: 1 ms, worse, note: ok", ""]
    assert shown(capsys) == want


def test_a_word_longer_than_a_line_is_left_to_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr(table, "_on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    table.print_table("Title", ("path", "state"), [("/" + "d" * 60, "written")])
    assert shown(capsys) == ["Title", "  /" + "d" * 60, "    state: written", ""]


def test_a_file_gets_lines_of_any_length(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    table.print_table(TITLE, HEADER, ROWS)
    table.print_text(TITLE)
    lines = shown(capsys)
    assert lines[0] == lines[-1] == TITLE and len(lines) == 6
    assert [len(line) > 100 for line in lines] == [False, True, True, True, False, False]


@pytest.mark.parametrize("width", [80], indirect=True)
def test_the_demo_and_the_benchmark_fit_a_terminal(width, vitfast, monkeypatch, tmp_path):
    """Their real tables and notes, in which a model's name and its numbers stay whole."""
    monkeypatch.setattr(showcase, "SECONDS_A_MODEL", 0.01)
    models = ("--models", "test_vit@64,test_vit2@96x64")
    speed = ("--sections", "speed", "--output", tmp_path / "r.html")  # others: tests/demo
    status, text, err = vitfast("demo", *models, *speed)
    assert (status, err) == (0, "")
    for part in ("test_vit2 @ 96x64", "float32", "vitfast", "budget", "float64", "5 of 5"):
        assert part in text
    words = ("--model", "test_vit", "--img-size", "64", "--peers", "eager")
    status, measured, err = vitfast("bench", "models", *words, "--seconds", "0.01", "--no-memory")
    assert (status, err) == (0, "")
    for part in ("test_vit", "1x3x64x64", "eager", "of floor", "error/budget"):
        assert part in measured
    lines = [line for line in (text + measured).splitlines() if "report: " not in line]
    assert max(map(len, lines)) <= width
