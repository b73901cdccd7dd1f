"""`vitfast demo`: the run from a photograph to a report, with small models."""

from __future__ import annotations

import os

import pytest
from PIL import Image

from vitfast.bench import child
from vitfast.cli import demo
from vitfast.demo import duplicates, showcase


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Little timed work, and peaks of memory without a process each (tests/demo has those)."""
    monkeypatch.setattr(showcase, "SECONDS_A_MODEL", 0.01)
    monkeypatch.setattr(child, "peak_in_child", lambda arguments: 12.0)


def test_a_photograph_becomes_a_report(vitfast, tmp_path):
    photo = tmp_path / "photo.png"
    Image.effect_noise((80, 60), 50).save(photo)
    words = ("--models", "test_vit@64,test_vit2@96x64", "--image", photo, "--output", tmp_path)
    status, out, err = vitfast("demo", *words, "--sections", "speed")
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
    words = ("--models", "test_vit@64", "--sections", "speed", "--output", path)
    status, out, _ = vitfast("demo", *words)
    assert status == 1
    assert "OVER" in out
    assert path.exists()


def test_a_model_that_fails_leaves_the_others_alone(vitfast, tmp_path):
    path = tmp_path / "r.html"
    words = ("--models", "test_vit@5x5,test_vit@64", "--sections", "speed", "--output", path)
    status, out, err = vitfast("demo", *words)
    assert (status, err) == (1, "")
    assert "test_vit @ 5x5 failed: " in out and "failed: test_vit @ 5x5." in out
    assert "test_vit @ 5x5 failed: " in path.read_text()
    assert "test_vit @ 64" in path.read_text()


def test_a_section_that_fails_leaves_the_others_alone(vitfast, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("no <memory>\nfor it")

    monkeypatch.setattr(duplicates, "run", fail)
    path = tmp_path / "r.html"
    words = ("--quick", "--sections", "attention,duplicates", "--output", path)
    status, out, err = vitfast("demo", *words)
    assert (status, err) == (1, "")
    assert "near-duplicates failed: no <memory>" in out
    assert "Failed: no &lt;memory&gt;" in path.read_text()
    assert "Attention map of test_vit" in path.read_text()
    assert "<table" not in path.read_text()  # no models, no large photograph


def test_an_interrupt_leaves_no_report(vitfast, tmp_path, monkeypatch):
    def interrupted(*args):
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
        (("--sections", "speed,taste"), "expected some of speed, large"),
        (("--sections", ","), "expected some of speed, large"),
        (("--large-model", "convnxt_tiny"), "did you mean"),
        (("--large-size", "4K"), "--large-size 4K: expected a size"),
        (("--output", "/no/such/folder/r.html"), "there is no folder"),
    ],
)
def test_mistakes_are_one_line_and_status_2(vitfast, words, message):
    status, out, err = vitfast("demo", *words)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
