"""The whole demo in its quick mode, with all of its processes: one run, and what the page shows."""

from __future__ import annotations

import base64
import contextlib
import io
import re

import pytest
from PIL import Image

from vitfast.cli import table
from vitfast.cli.main import main
from vitfast.demo import showcase


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[str, str]:
    """The page, and what a terminal of 80 columns showed."""
    path = tmp_path_factory.mktemp("demo") / "r.html"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as text:
        patch.setattr(showcase, "SECONDS_A_MODEL", 0.01)
        patch.setattr(table, "_on_terminal", lambda: True)
        patch.setenv("COLUMNS", "80")
        patch.setenv("NO_COLOR", "1")
        words = ("--quick", "--models", "test_vit@64", "--device", "cpu", "--output", str(path))
        assert main(["demo", *words]) == 0
    return path.read_text(encoding="utf-8"), text.getvalue()


@pytest.fixture
def report(run) -> str:
    return run[0]


def test_it_fits_a_terminal(run):
    lines = [line for line in run[1].splitlines() if "report: " not in line]
    assert len(lines) > 10
    assert max(map(len, lines)) <= 80


def test_every_section_is_there(report):
    for title in ("Speed and memory", "A large photograph", "What a model attends to",
                  "Near-duplicates", "What was swapped"):  # fmt: skip
        assert f"<h2>{title}</h2>" in report
    assert "Failed" not in report and "failed" not in report


def test_pictures_lie_in_the_page_and_say_what_they_show(report):
    images = re.findall(r"<img ([^>]*)>", report)
    assert len(images) >= 1 + 3 + 1 + 8
    for attributes in images:
        found = re.search(r'src="data:image/jpeg;base64,([^"]+)"', attributes)
        image = Image.open(io.BytesIO(base64.b64decode(found[1])))
        image.load()
        assert image.width <= 760
        assert re.search(r'alt="[^"]{3,}"', attributes)
    assert not re.search(r'(src|href)="(?!data:)', report)


def test_memory_is_measured_and_every_number_says_so(report):
    table = re.search(r'<table id="speed">(.*?)</table>', report, re.S)[1]
    peaks = [int(n) for n in re.findall(r"<td>(\d+) MB</td>", table)]
    assert len(peaks) == 2 or "does not tell the peak" in report
    assert all(peak > 0 for peak in peaks)
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", report)


def test_the_verdict_agrees_with_the_table(report):
    table = re.search(r'<table id="speed">(.*?)</table>', report, re.S)[1]
    ratio = re.search(r"([\d.]+)x", table)[1]
    pace = re.search(r"<small>(faster|level|slower)</small>", table)[1]
    verdict = re.search(r'class="verdict">([^<]*)<', report)[1]
    assert f"{pace} on 1 of 1 model ({ratio}x the speed)" in verdict
    assert "kept the error budget on 1 of 1." in verdict


def test_the_large_photograph_says_that_it_was_upscaled_or_scaled(report):
    assert re.search(r"(upscaled|scaled down) to 480 x 270 pixels", report)
    assert "tiles of 128 x 128 pixels" in report
    assert "weights are random" in report.lower()
