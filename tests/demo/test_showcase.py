"""The demo's runs: models, budgets, and a clock that is kept to."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from vitfast.bench import child, modules
from vitfast.bench.peers import Setting
from vitfast.demo import showcase
from vitfast.demo.showcase import Failure, Outcome, Showcase, parse_models, verdict
from vitfast.errors import InputValueError
from vitfast.swap import SwapReport


def quiet(text: str, share: float) -> None:
    pass


@pytest.fixture
def photo() -> Image.Image:
    return Image.effect_noise((90, 70), 60).convert("RGB")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(showcase, "SECONDS_A_MODEL", 0.01)


def test_the_main_job_is_the_default():
    assert parse_models(None) == [
        ("vit_base_patch16_224", (224, 224)),
        ("convnext_tiny", (288, 288)),
        ("vit_small_patch14_dinov2", (518, 518)),
        ("vit_small_patch16_dinov3", (256, 256)),
        ("vit_base_patch16_224", (1024, 1024)),
    ]


def test_models_by_name_and_size():
    assert parse_models("test_vit@64x96, test_vit2") == [
        ("test_vit", (64, 96)),
        ("test_vit2", None),
    ]
    for text in ("", "xyzzy", "test_vit@", "test_vit@big"):
        with pytest.raises(InputValueError):
            parse_models(text)


def test_a_run_has_everything(photo):
    found = Showcase(photo, Setting()).run("test_vit", (64, 64), quiet)
    assert found.title == "test_vit @ 64"
    assert found.report.counts["blocks_swapped"] == found.report.counts["blocks"] > 0
    assert found.timm_ms > 0
    assert found.vitfast_ms > 0
    low, high = found.vitfast_quartiles_ms
    assert found.rounds >= 3 and 0 < low <= found.vitfast_ms <= high
    assert 0 < found.error <= found.budget
    assert found.within_budget
    assert "float64" in found.budget_from
    assert found.agreement == 5
    assert found.labels == []  # random weights have nothing to say
    assert "Block" in found.swapped_classes()
    assert found.as_json()["ratio"] == found.ratio


def test_a_model_without_classes_has_no_agreement(photo):
    found = Showcase(photo, Setting()).run("vit_small_patch16_dinov3", (64, 64), quiet)
    assert found.agreement is None
    assert found.within_budget


def test_a_wrong_output_is_over_budget(photo, monkeypatch):
    stage = Showcase(photo, Setting())
    model = modules.model_case("test_vit", (64, 64), 1, Setting())
    timm = model.module(*model.inputs).detach()
    found = Outcome("test_vit", 64, 64, "float32", SwapReport("x"))
    stage._judge(found, model, {"timm": timm, "vitfast": timm + 1e-3})
    assert not found.within_budget
    stage._judge(found, model, {"timm": timm, "vitfast": timm.fill_(float("nan"))})
    assert not found.within_budget


def test_without_time_the_budget_is_one_that_was_measured_and_says_which(photo):
    now = [0.0]
    stage = Showcase(photo, Setting(), seconds=1000.0, clock=lambda: now[0])
    first = stage.run("test_vit", (64, 64), quiet)
    now[0] = 999.999
    larger = stage.run("test_vit", (96, 96), quiet)
    other = stage.run("test_vit2", (64, 64), quiet)
    difference = "largest difference from timm, against 1.5x the budget measured"
    assert larger.budget_from == f"too slow for float64 here: {difference} at 64"
    assert other.budget_from == (
        f"too slow for float64 here, and no smaller size ran: {difference} on test_vit @ 64"
    )
    for found in (larger, other):
        assert found.rounds == 1 and found.timm_quartiles_ms is None
        assert 0 < found.budget < 20 * first.budget
        assert found.within_budget


def test_of_several_measured_budgets_the_model_s_own_counts(photo):
    now = [0.0]
    stage = Showcase(photo, Setting(), seconds=1000.0, clock=lambda: now[0])
    stage.run("test_vit", (64, 64), quiet)
    stage.run("test_vit2", (96, 96), quiet)
    now[0] = 999.999
    for name, size in (("test_vit", 64), ("test_vit2", 96)):
        found = stage.run(name, (32, 32), quiet)
        assert found.budget_from.endswith(f"1.5x the budget measured at {size}")


def test_without_time_or_a_measured_budget_there_is_still_one(photo):
    found = Showcase(photo, Setting(), seconds=0.0).run("test_vit", (64, 64), quiet)
    assert "no smaller size ran" in found.budget_from
    assert found.budget_from.endswith("1.5x 64 units in the last place")
    assert found.within_budget


def test_a_size_that_a_model_cannot_take_is_named(photo):
    with pytest.raises(InputValueError, match="test_vit"):
        Showcase(photo, Setting()).run("test_vit", (5, 5), quiet)


def test_the_photograph_is_what_the_model_sees(photo):
    stage = Showcase(photo, Setting())
    model = modules.model_case("test_vit", (64, 64), 1, Setting()).module
    image = stage._image(model, (64, 96))
    assert image.shape == (1, 3, 64, 96)
    assert not torch.equal(image, Showcase(photo.rotate(180), Setting())._image(model, (64, 96)))


def test_peaks_of_memory_or_why_there_are_none(photo, monkeypatch):
    stage = Showcase(photo, Setting())
    found = Outcome("test_vit", 64, 96, "float32", SwapReport("x"))
    peaks = {"eager": 30.0, "vitfast": 20.0}
    seen = []

    def peak(arguments):
        seen.append(arguments)
        return peaks[arguments["contender"]]

    monkeypatch.setattr(child, "peak_in_child", peak)
    stage.measure_memory(found, quiet)
    assert (found.timm_mb, found.vitfast_mb, found.memory_reason) == (30.0, 20.0, "")
    assert {a["img_size"] for a in seen} == {(64, 96)}
    peaks["vitfast"] = None
    stage.measure_memory(found, quiet)
    assert (found.timm_mb, found.vitfast_mb) == (30.0, None)
    assert "does not tell" in found.memory_reason
    del peaks["vitfast"]

    def fail(arguments):
        raise child.ChildError("killed")

    monkeypatch.setattr(child, "peak_in_child", fail)
    stage.measure_memory(found, quiet)
    assert found.memory_reason == "the process that measures it failed: killed"


def measured(timm, ours, memory=(30.0, 20.0), error=1.0, spread=5.0) -> Outcome:
    return Outcome(
        "m", 64, 64, "float32", SwapReport("x"), timm, ours, 3, (timm - spread, timm + spread),
        (ours - spread, ours + spread), *memory, error=error, budget=2.0,
    )  # fmt: skip


def test_the_verdict_is_what_the_numbers_say():
    fast, even, slow = measured(200.0, 100.0), measured(100.0, 98.0), measured(100.0, 200.0)
    assert [o.pace for o in (fast, even, slow)] == ["faster", "level", "slower"]
    assert verdict([fast]) == (
        "vitfast beside timm was faster on 1 of 1 model (2.00x the speed), took less memory on "
        "1 of 1, and kept the error budget on 1 of 1."
    )
    greedy = measured(100.0, 98.0, (20.0, 30.0), error=3.0)
    unknown = measured(100.0, 98.0, (20.0, None))
    assert verdict([fast, even, slow, greedy, unknown], [Failure("bad @ 5", "too small")]) == (
        "vitfast beside timm was faster on 1 of 5, level on 3 of 5, slower on 1 of 5 models (0.50x "
        "to 2.00x the speed), took less memory on 3 of 4, and kept the error budget on 4 of 5; "
        "failed: bad @ 5."
    )
    assert verdict([], [Failure("a", "b")]) == "No model could be compared; failed: a."


def test_one_round_is_judged_by_its_times_alone():
    once = measured(100.0, 98.0)
    once.timm_quartiles_ms = once.vitfast_quartiles_ms = None
    assert once.pace == "faster"
