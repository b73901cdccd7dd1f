"""`vitfast demo`: the run from a photograph to a report, with small models."""

from __future__ import annotations

import os

import pytest
from PIL import Image

from vitfast.cli import demo
from vitfast.demo import showcase


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(showcase, "SECONDS_A_MODEL", 0.01)


def test_a_photograph_becomes_a_report(vitfast, tmp_path):
    photo = tmp_path / "photo.png"
    Image.effect_noise((80, 60), 50).save(photo)
    words = ("--models", "test_vit@64,test_vit2@96x64", "--image", photo, "--output", tmp_path)
    status, out, err = vitfast("demo", *words)
    assert (status, err) == (0, "")
    assert "test_vit @ 64" in out
    assert "test_vit2 @ 96x64" in out
    assert "5 of 5" in out
    report = tmp_path / demo.REPORT
    assert f"report: {report}" in out
    assert "test_vit2 @ 96x64" in report.read_text()
    assert sorted(os.listdir(tmp_path)) == ["photo.png", demo.REPORT]


def test_an_error_over_budget_is_status_1(vitfast, tmp_path, monkeypatch):
    judge = showcase.Showcase._judge

    def strict(self, outcome, case, outputs):
        judge(self, outcome, case, {**outputs, "vitfast": outputs["vitfast"] + 1.0})

    monkeypatch.setattr(showcase.Showcase, "_judge", strict)
    path = tmp_path / "r.html"
    status, out, _ = vitfast("demo", "--models", "test_vit@64", "--output", path)
    assert status == 1
    assert "OVER" in out
    assert path.exists()


def test_an_interrupt_leaves_no_report(vitfast, tmp_path, monkeypatch):
    def interrupted(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(showcase.Showcase, "run", interrupted)
    monkeypatch.setattr(showcase.Showcase, "warm_up", lambda self: None)
    status, _, err = vitfast("demo", "--output", tmp_path / "r.html")
    assert (status, err) == (130, "vitfast: interrupted\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "words, message",
    [
        (("--image", "/no/such.jpg"), "no such file"),
        (("--image", "/"), "is a folder"),
        (("--image", __file__), "no image that Pillow knows"),
        (("--models", "vit_bse_patch16_224"), "did you mean"),
        (("--models", ","), "no model named"),
        (("--output", "/no/such/folder/r.html"), "there is no folder"),
    ],
)
def test_mistakes_are_one_line_and_status_2(vitfast, words, message):
    status, out, err = vitfast("demo", *words)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
