"""The report: one file, nothing from outside, every text escaped, one pair of bars a model."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from PIL import Image

from vitfast.demo import page
from vitfast.demo.showcase import Outcome
from vitfast.swap import Skipped, Swapped, SwapReport

EVIL = "<script>alert('&')</script>"
MACHINE = {"name": EVIL, "versions": {"vitfast": "1", "torch": "2", "timm": "3"}}


def outcome(name: str = "vit_tiny", **changes) -> Outcome:
    report = SwapReport(
        "VisionTransformer",
        [Swapped("blocks.0", "Block", "vitfast.layers.Block", "block")],
        [Skipped("head", "Head", "part", EVIL)],
    )
    values = {
        "timm_ms": 212.0, "vitfast_ms": 100.0, "rounds": 7, "timm_mb": 10.0, "error": 1e-6,
        "budget": 2e-6, "budget_from": EVIL, "agreement": 5,
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


@pytest.fixture
def rendered() -> str:
    photo = Image.new("RGB", (500, 300), "teal")
    outcomes = [outcome(EVIL, labels=[(EVIL, 0.5)]), outcome(vitfast_ms=400.0, agreement=None)]
    return page.render(outcomes, MACHINE, photo, EVIL, pretrained=True)


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
    ):
        assert expected in text


def test_an_error_over_budget_shows():
    good = page.render([outcome()], MACHINE, None, "", False)
    bad = page.render([outcome(error=1.0)], MACHINE, None, "", False)
    assert good.count('class="bad"') == 0
    assert bad.count('class="bad"') == 1


def test_bars_are_as_long_as_the_times():
    svg = ET.fromstring(page.chart([outcome(), outcome(vitfast_ms=424.0)]))
    space = "{http://www.w3.org/2000/svg}"
    widths = []
    for path in svg.iter(f"{space}path"):
        style = path.get("style", "")
        if page.GREY in style or page.GREEN in style:
            numbers = [
                float(n) for n in path.get("d", "").replace("z", "").split() if n not in "ML"
            ]
            widths.append(max(numbers[::2]) - min(numbers[::2]))
    timm_1, fast, timm_2, slow = (w / widths[0] for w in widths)
    assert (timm_1, timm_2) == pytest.approx((1.0, 1.0), rel=1e-3)
    assert (fast, slow) == pytest.approx((100 / 212, 2.0), rel=1e-3)


def test_the_chart_is_the_same_every_time():
    assert page.chart([outcome()]) == page.chart([outcome()])
