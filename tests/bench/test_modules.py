"""Cases of blocks and whole models, and the rows that come of measuring them."""

from __future__ import annotations

import pytest
import torch

from vitfast.bench import child, machine, modules
from vitfast.bench.child import ChildError, add_model_memory, peak_in_child
from vitfast.bench.peers import Setting
from vitfast.bench.record import Result, Row
from vitfast.errors import InputValueError

SIZE = (64, 64)


@pytest.fixture(autouse=True)
def ceilings(monkeypatch):
    """Ceilings that need no measuring."""
    monkeypatch.setattr(machine, "gemm_gflops", lambda device, dtype: 100.0)
    monkeypatch.setattr(machine, "copy_gbs", lambda device: 10.0)


def test_a_block_gets_the_tokens_that_reach_it():
    case = modules.block_case("test_vit", SIZE, 2, Setting())
    assert case.shape == "2x17x64"
    assert case.inputs[0].abs().max() > 0
    hidden = case.module.block.mlp.fc1.out_features
    linear = 2 * (2 * 17) * 64 * (3 * 64 + 64 + 2 * hidden)  # qkv, proj, fc1, fc2
    assert case.cost().flops == linear + 2 * 4 * 17 * 17 * 64  # and q k^T, times v


def test_a_block_keeps_its_other_arguments():
    case = modules.block_case("vit_small_patch16_dinov3", SIZE, 1, Setting())
    assert case.module.kwargs.get("rope") is not None
    assert case.module(*case.inputs).shape == case.inputs[0].shape
    exact = modules.reference_outputs(case)[0]
    assert exact.dtype == torch.float64
    assert (exact - case.module(*case.inputs)).abs().max() < 1e-3


def test_a_model_without_blocks_is_refused():
    with pytest.raises(InputValueError, match="test_resnet has no list of blocks"):
        modules.block_case("test_resnet", SIZE, 1, Setting())


def test_the_first_block_of_a_model_in_stages():
    case = modules.block_case("swin_tiny_patch4_window7_224", (224, 224), 1, Setting())
    assert case.shape == "1x56x56x96"


@pytest.mark.parametrize("train", [False, True])
def test_a_row_has_everything(train):
    case = modules.model_case("test_vit", SIZE, 1, Setting(train=train))
    assert case.module.training is train
    row = modules.measure(case, ["eager", "openvino"], seconds=0.01)
    assert row.key == ("models", "test_vit", "1x3x64x64", "float32", row.passes, "cpu")
    assert row.passes == ("train" if train else "infer")
    assert set(row.results) == {"eager", "openvino", "vitfast"}
    if train:
        assert row.results["openvino"].reason == "inference only"
    ours = row.results["vitfast"]
    assert 0 < ours.q1_ms <= ours.median_ms <= ours.q3_ms
    assert ours.rounds >= 3
    assert 0 < ours.error_over_budget <= 1
    assert row.ratio("eager") > 0
    assert row.unit in ("GFLOP/s", "GB/s")
    assert 0 < row.floor_share < 1


def test_a_model_that_is_not_swapped_has_its_peers_times():
    case = modules.model_case("test_resnet", SIZE, 1, Setting())
    row = modules.measure(case, ["eager"], seconds=0.01)
    assert not row.swapped
    assert row.results["vitfast"] == Result(reason="not swapped")
    assert row.results["eager"].median_ms > 0 and row.results["eager"].floor_share > 0
    assert row.ratios() == {} and row.rate is None and row.floor_share is None
    alone = modules.measure(case, [], seconds=0.01)
    assert alone.results == {"vitfast": Result(reason="not swapped")}


def test_training_counts_three_times_the_work():
    once, thrice = (
        modules.model_case("test_vit", SIZE, 1, Setting(train=train)).cost()
        for train in (False, True)
    )
    assert thrice.flops == 3 * once.flops


def test_a_case_too_large_for_float64_is_timed_without_an_error(monkeypatch):
    monkeypatch.setattr(modules, "REFERENCE_FLOPS", {"cpu": 1.0})
    case = modules.model_case("test_vit", SIZE, 1, Setting())
    row = modules.measure(case, [], seconds=0.01)
    assert row.results["vitfast"].error_over_budget is None
    assert "too long" in row.note


def test_the_judge_rejects_a_wrong_output_and_remembers_it():
    case = modules.model_case("test_vit", SIZE, 1, Setting())
    judge = modules.Judge(case)
    right = judge.base[0]
    assert judge("a", right) <= 0.5
    assert judge("a", right * 1.01) > 1
    assert judge("a", right) <= 0.5
    assert judge.worst["a"] > 1
    assert judge("b", torch.full_like(right, float("nan"))) == float("inf")


def test_memory_is_measured_in_a_process_of_its_own():
    arguments = {
        "model": "test_vit", "img_size": SIZE, "batch": 1, "dtype": "float32", "device": "cpu",
        "train": False, "threads": 1, "contender": "eager",
    }  # fmt: skip
    peak = peak_in_child(arguments)
    assert peak is None or 0 < peak < 400
    with pytest.raises(ChildError, match="timm has no model"):
        peak_in_child({**arguments, "model": "xyzzy"})


def test_a_failed_child_is_a_note(monkeypatch):
    def fail(arguments):
        if arguments["contender"] == "eager":
            raise ChildError("killed")
        return 12.0

    monkeypatch.setattr(child, "peak_in_child", fail)
    results = {"eager": Result(1.0), "vitfast": Result(1.0), "openvino": Result(reason="none")}
    row = Row("models", "m", "1", "float32", "infer", "cpu", results)
    add_model_memory(row, {}, lambda text, share: None)
    assert [r.peak_mb for r in results.values()] == [None, 12.0, None]
    assert row.note == "memory of eager: killed"
