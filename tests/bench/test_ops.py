"""Single ops: which cases run, what their contenders are, and how errors are judged."""

from __future__ import annotations

import pytest
import torch

from vitfast.bench import machine, ops
from vitfast.bench.ops import OpCase
from vitfast.bench.peers import Setting
from vitfast.errors import InputValueError
from vitfast.ops.spec import Sample
from vitfast.testing.inputs import materialise


@pytest.fixture(autouse=True)
def ceilings(monkeypatch):
    """Ceilings that need no measuring."""
    monkeypatch.setattr(machine, "gemm_gflops", lambda device, dtype: 100.0)
    monkeypatch.setattr(machine, "copy_gbs", lambda device: 10.0)


def small_case(train: bool = False, *tags: str) -> OpCase:
    (spec,) = ops.specs(["layer_norm"])
    generator = torch.Generator().manual_seed(0)

    def make(dtype, _):
        x, weight = (torch.randn(n, generator=generator).to(dtype) for n in ((4, 8), (8,)))
        return (x, weight), {}

    return OpCase(spec, Sample("small", make, frozenset(tags)), Setting(train=train))


def test_specs_by_name():
    assert [s.name for s in ops.specs(["attention"])] == ["attention"]
    assert len(ops.specs(None)) == len(ops.specs([])) > 1
    with pytest.raises(InputValueError, match="no op 'attn'; there is layer_norm"):
        ops.specs(["attn"])


def test_real_cases_are_real_and_fit():
    found = ops.real_cases(ops.specs(None), Setting())
    assert {case.spec.name for case in found} == {spec.name for spec in ops.specs(None)}
    assert all("real" in c.sample.tags and not c.large for c in found)


def test_a_sample_named_is_taken_whatever_its_tags():
    (spec,) = ops.specs(["layer_norm"])
    large = next(s for s in spec.samples if "large" in s.tags)
    assert [c.sample for c in ops.real_cases([spec], Setting(), large.name)] == [large]
    assert ops.real_cases([spec], Setting(), "none") == []


@pytest.mark.parametrize("train", [False, True])
def test_a_row_has_everything(train):
    row = ops.measure(small_case(train), ["eager", "vendor", "openvino"], seconds=0.01)
    assert row.key[:4] == ("ops", "layer_norm small", "4x8", "float32")
    assert row.results["vendor"].reason == "this op has no such backend"
    assert row.results["openvino"].reason == "runs blocks and models, not single ops"
    assert row.ratio("eager") > 0
    assert row.backend in ops.specs(["layer_norm"])[0].dispatcher.backends
    assert 0 <= row.results["vitfast"].error_over_budget <= 1


@pytest.mark.parametrize("spec", ops.specs(None), ids=lambda spec: spec.name)
def test_costs_do_not_depend_on_how_arguments_are_passed(spec):
    sample = next(s for s in spec.samples if "check" in s.tags)
    args, kwargs = sample.make(torch.float32, torch.Generator().manual_seed(0))
    call = materialise(spec, sample, torch.float32)
    assert spec.cost(*ops.as_passed(call)) == spec.cost(args, kwargs)


def test_a_backend_that_refuses_is_a_reason(monkeypatch):
    (spec,) = ops.specs(["layer_norm"])
    backend = spec.dispatcher.backends["cpu"]
    monkeypatch.setitem(
        spec.dispatcher.backends,
        "cpu",
        type(backend)(backend.name, backend.forward, lambda *args: ["not today"]),
    )
    row = ops.measure(small_case(), ["cpu"], seconds=0.01, with_memory=False)
    assert row.results["cpu"].reason == "not today"
    assert row.backend == "reference"
    assert row.results["vitfast"].peak_mb is None


def test_plain_pytorch_stays_away_from_large_samples():
    row = ops.measure(small_case(False, "large"), ["eager"], seconds=0.01)
    assert "may not fit" in row.results["eager"].reason
    assert row.results["vitfast"].median_ms > 0
    assert row.results["vitfast"].error_over_budget is None


def test_the_judge_rejects_wrong_outputs_and_gradients():
    case = small_case(train=True)
    call = materialise(case.spec, case.sample, torch.float32)
    judge = ops.Judge(case, call)
    right = ops.contender(case, call, "vitfast")()
    assert len(right) == 3  # the output, and gradients of x and weight
    assert judge("vitfast", right) <= 1
    for i in range(len(right)):
        wrong = list(right)
        wrong[i] = 1.01 * wrong[i]
        assert judge("vitfast", wrong) > 1, i
    assert judge.worst["vitfast"] > 1


def test_a_model_shows_what_it_passes_to_each_op():
    before = {name: getattr(ops.ops, name) for name in ops.ops.NAMES}
    found = ops.model_cases(ops.specs(None), "test_vit", (64, 64), 2, Setting(torch.bfloat16))
    names = {case.spec.name for case in found}
    assert {"attention", "linear_act", "patch_embed"} <= names
    assert {name: getattr(ops.ops, name) for name in ops.ops.NAMES} == before
    attention = next(case for case in found if case.spec.name == "attention")
    assert attention.autocast
    call = materialise(attention.spec, attention.sample, torch.bfloat16)
    assert next(t for _, t in call.tensors()).shape[:2] == (2, 17)
    for case in found:
        row = ops.measure(case, ["eager"], seconds=0.01)
        assert row.dtype == "bfloat16"
        assert row.results["eager"].median_ms
        assert row.results["vitfast"].error_over_budget <= 1


def test_the_judge_sends_back_the_gradients_that_the_contenders_get():
    """Rounded to the working dtype: or its own rounding would be in every budget."""
    spec = ops.specs(["residual_add"])[0]
    sample = Sample("small", lambda d, g: (tuple(torch.ones(3, 8, dtype=d) for _ in "ab"), {}))
    case = OpCase(spec, sample, Setting(torch.bfloat16, train=True))
    judge = ops.Judge(case, materialise(spec, sample, torch.bfloat16))
    assert torch.equal(judge.reference[1], judge.base[1].double())  # that of x: what came in
