"""The report: one file, nothing from outside, every text escaped, one pair of bars a model."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from vitfast.demo import page
from vitfast.demo.large import Large, Scale, Way
from vitfast.demo.photo import Photograph
from vitfast.demo.showcase import Outcome
from vitfast.runtime import device
from vitfast.swap import Skipped, Swapped, SwapReport

EVIL = "<script>alert('&')</script>"
MACHINE = {"name": EVIL, "isa": "avx2", "versions": {"vitfast": "1", "torch": "2", "timm": "3"}}


def outcome(name: str = "vit_tiny", **changes) -> Outcome:
    report = SwapReport(
        "VisionTransformer",
        [Swapped("blocks.0", "Block", "vitfast.layers.Block", "block")],
        [Skipped("head", "Head", "part", EVIL)],
    )
    values = {
        "timm_ms": 212.0, "vitfast_ms": 100.0, "rounds": 7, "timm_quartiles_ms": (210.0, 215.0),
        "vitfast_quartiles_ms": (99.0, 103.0), "timm_mb": 10.0, "vitfast_mb": 15.0,
        "error": 1e-6, "budget": 2e-6, "budget_from": EVIL, "agreement": 5,
    }  # fmt: skip
    return Outcome(name, 224, 224, "float32", report, **{**values, **changes})


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not match."""

    VOID = {"meta", "img", "br", "path", "use", "rect"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.text += data


def rendering(outcomes=(), **more) -> str:
    photo = Photograph(Image.new("RGB", (500, 300), "teal"), EVIL)
    values = {
        "pretrained": True,
        "created": "2026-11-30 12:00 UTC",
        "command": "vitfast demo",
        **more,
    }
    return page.render(page.Report(list(outcomes), MACHINE, photo, **values))


@pytest.fixture
def rendered() -> str:
    return rendering(
        [outcome(EVIL, labels=[(EVIL, 0.5)]), outcome(vitfast_ms=400.0, agreement=None)]
    )


def test_texts_are_escaped(rendered):
    found = Page(rendered)
    assert "script" not in {tag for tag, _ in found.tags}
    assert found.text.count(EVIL) >= 5  # name, machine, budget, label, swap report


def test_nothing_comes_from_outside(rendered):
    for tag, attributes in Page(rendered).tags:
        assert tag not in ("link", "iframe", "script")
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name, "")
            assert value.startswith(("data:", "#")) or not value, (tag, name, value)
    assert "@import" not in rendered
    assert "url(http" not in rendered


def test_numbers_are_in_the_table(rendered):
    text = " ".join(Page(rendered).text.split())
    for expected in (
        "212 ms",
        "100 ms",
        "2.12x",
        "0.53x",
        "1.0e-06 / 2.0e-06",
        "5 of 5",
        "7 rounds",
        "210 ms to 215 ms",
        "10 MB",
        "2026-11-30 12:00 UTC",
        "kernels for avx2",
    ):
        assert expected in text


def test_an_error_over_budget_shows():
    assert rendering([outcome()]).count('class="bad"') == 0
    assert rendering([outcome(error=1.0)]).count('class="bad"') == 1


def cells(text: str, table: str) -> list[list[str]]:
    """The texts of a table's cells, row by row, without the header."""
    body = re.search(rf'<table id="{table}">(.*?)</table>', text, re.S)[1]
    body = body.replace("<small>", " <small>")  # a line of its own
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.S)[1:]
    return [
        [" ".join(Page(f"<p>{cell}</p>").text.split())
         for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.S)]
        for row in rows
    ]  # fmt: skip


UNIT = re.compile(
    r"[\d.]+ (us|ms|s) [\d.]+ (us|ms|s) to [\d.]+ (us|ms|s)( in \d+ calls)?|[\d.]+ s one call|"
    r"[\d.]+x (faster|slower|level)|\d+ MB|[\d.]+(e-\d+)? %|\d of 5|[\d.e+-]+ / [\d.e+-]+"
)
"""A figure of a table, with its unit."""


def figures_without_unit_or_reason(text: str) -> list[str]:
    """Cells of the page's tables that are neither, and numbers of notes that there are not."""
    found, reasons = [], re.findall(r'<p class="muted"><sup>(\d+)</sup>\s*[^<]*\w', text)
    for table, names in (("speed", 2), ("large", 1)):
        for row in cells(text, table) if f'id="{table}"' in text else ():
            for cell in row[names:]:
                # A spread may be missing beside a median that is not.
                dash = re.fullmatch(r"([\d.]+ (us|ms|s) )?-(\d+)", cell)
                if dash is None and UNIT.fullmatch(cell) is None:
                    found.append(cell)
                elif dash is not None and dash[3] not in reasons:
                    found.append(f"{cell} has no reason")
    return found


def test_every_figure_has_its_unit_and_every_dash_its_reason(rendered):
    assert len(cells(rendered, "speed")) == 2
    assert figures_without_unit_or_reason(rendered) == []
    text = rendering(
        [outcome(timm_quartiles_ms=None, vitfast_quartiles_ms=None, timm_mb=None, vitfast_mb=None,
                 agreement=None, rounds=1, memory_reason="nobody knows")],
        large=large([Way("timm", reason="failed: <it>", peak_reason="it failed"),
                     Way("vitfast", [2.0, 3.0], 500.0, apart_reason="itself"),
                     Way("tiles", [4.0], None, 3e-6, peak_reason="unknown")]),
    )  # fmt: skip
    assert figures_without_unit_or_reason(text) == []
    assert cells(text, "large")[1] == [
        "vitfast, one shot", "2.50 s 2.00 s to 3.00 s in 2 calls", "500 MB", "-4",
    ]  # fmt: skip
    assert cells(text, "large")[2] == ["vitfast, tiles", "4.00 s one call", "-5", "3.0e-04 %"]
    for reason in (
        "one round has no spread",
        "nobody knows",
        "gives features",
        "failed: &lt;it&gt;",
    ):
        assert reason in text


@pytest.mark.parametrize(
    "find, put, rejected",
    [
        ("10 MB</td>", "10</td>", "10"),
        ("210 ms to 215 ms", "210 to 215", "212 ms 210 to 215"),
        ("vit_tiny @ 224 gives features, no classes", "", "-1 has no reason"),
        ("<sup>1</sup></td>", "</td>", "-"),
    ],
)
def test_a_figure_without_unit_or_a_dash_without_reason_is_found(rendered, find, put, rejected):
    assert find in rendered
    assert rejected in figures_without_unit_or_reason(rendered.replace(find, put))


def test_bars_are_as_long_as_the_times_and_peaks():
    text = rendering([outcome(), outcome(vitfast_ms=424.0, timm_mb=None)])
    widths = [float(w) for w in re.findall(r'style="width: ([\d.]+)%"', text)]
    assert widths[:4] == [100.0, 47.2, 50.0, 100.0]  # times: 212 and 100 ms, 212 and 424 ms
    assert widths[4:] == [66.7, 100.0, 0.0, 100.0]  # 10 and 15 MB, unknown and 15 MB
    assert "timm unknown" in text


def test_the_page_is_the_same_every_time(rendered):
    assert rendered == rendering(
        [outcome(EVIL, labels=[(EVIL, 0.5)]), outcome(vitfast_ms=400.0, agreement=None)]
    )


def large(ways: list[Way]) -> Large:
    image = Image.new("RGB", (64, 36), "olive")
    return Large(Scale("test_convnext", (36, 64), 16), EVIL, image, ways, {"tiles": image})


def test_a_failed_way_is_said_in_the_sentence():
    ways = [Way("timm", [1.0]), Way("vitfast", reason="failed: no memory"), Way("tiles", [2.0])]
    assert large(ways).sentence() == "vitfast, one shot: failed: no memory."


def test_the_sentence_of_the_large_photograph_has_the_numbers_of_its_table():
    ways = [Way("timm", [9.0], 2000.0, 1e-6), Way("vitfast", [4.0, 6.0], 900.0),
            Way("tiles", [7.0], 400.0, 0.158)]  # fmt: skip
    text = large(ways).sentence()
    assert "one shot in 5.00 s and 900 MB, tiles of 16 x 16 pixels in 7.00 s and 400 MB" in text
    assert "features of tiles lie 15.8 % from" in text
    assert "timm's one shot took 9.00 s and 2000 MB and lies 1.0e-04 % away." in text


def test_light_dark_and_narrow():
    text = rendering([outcome()])
    style = text[text.index("<style>") : text.index("</style>")]
    light, dark = style.split("prefers-color-scheme: dark")
    names = set(re.findall(r"(--[a-z]+): #", light))
    assert names == set(re.findall(r"(--[a-z]+): #", dark))
    # Every colour of a rule is one that both schemes set.
    rules = dark[dark.index("* { box-sizing") :]
    assert "#" not in rules and set(re.findall(r"var\((--[a-z]+)\)", rules)) == names
    assert 'name="viewport"' in text
    for table in re.findall(r"[^\n]*<table", text):
        assert table.startswith('<div class="scroll">')
    wide = [float(n) for n in re.findall(r"minmax\(min\(100%, ([\d.]+)rem\)", style)]
    assert wide and 16 * max(wide) <= 460  # a column fits into a page of 500 pixels


def test_the_processor_is_named_exactly(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor : 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: X\nstepping\t: 2\n"
        "\nprocessor : 1\ncpu family\t: 99\nflags\n"
    )
    monkeypatch.setattr(device, "Path", lambda name: cpuinfo)
    machine = {**MACHINE, "name": "X, 2 threads"}
    assert page.where(machine) == ("X, 2 threads; family 25, model 1, stepping 2; kernels for avx2")
    cpuinfo.unlink()
    assert "family and model unknown to this system" in page.where(machine)
    assert page.where({**machine, "device": "cuda"}) == "X, 2 threads"
