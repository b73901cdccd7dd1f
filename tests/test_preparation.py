"""prepare: what it asks of a model, and ranks that have to agree. Workers are not started here."""

from __future__ import annotations

import pytest
import timm
import torch

import vitfast
from vitfast import preparation, swap
from vitfast.errors import InputTypeError, InputValueError
from vitfast.runtime import native, trust
from vitfast.runtime.verdicts import PASSES, RIGHT, WRONG, Question, Verdict
from vitfast.selftest import session
from vitfast.selftest.session import TrustEntry, TrustReport

CPU = torch.device("cpu")


@pytest.fixture
def wanted(monkeypatch):
    """The questions of each call of `decide`, with the problems; the CPU as a device to test."""
    found = []

    def decide(device, questions, progress):
        found.append(dict(questions))
        return TrustReport("a stand-in", [TrustEntry(q, RIGHT) for q in questions])

    monkeypatch.setattr(preparation, "decide", decide)
    monkeypatch.setattr(preparation, "is_testable", lambda device: True)
    return found


@pytest.fixture
def model():
    found = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    swap(found)
    return found


def test_a_model_s_layers_and_calls_are_asked_for(model, wanted):
    model.train()
    model.blocks[1].eval()
    report = vitfast.prepare(model, torch.randn(2, 3, 32, 32))
    (questions,) = wanted
    ops = {q.op for q in questions}
    assert {"attention", "add_norm", "layer_norm", "linear_act", "mlp", "patch_embed"} <= ops
    assert {q.passes for q in questions} == set(PASSES) and {q.dtype for q in questions} == {
        "float32"
    }
    own = {q.op: problems for q, problems in questions.items() if q.passes == "forward"}
    (attention,) = own["attention"]
    shapes = {str(v.shape) for v in attention.arguments.values() if hasattr(v, "shape")}
    assert any("2, 5, 3, 64" in s or "2, 5, 3, 3, 64" in s for s in shapes)  # of this sample
    assert model.training and not model.blocks[1].training
    assert report and len(report.tested) == len(questions)


def test_inference_only(model, wanted):
    vitfast.prepare(model, torch.randn(1, 3, 32, 32), train=False)
    assert {q.passes for q in wanted[0]} == {"forward"}


@pytest.mark.parametrize("kind", [tuple, dict, torch.Tensor])
def test_samples_as_the_model_takes_them(model, wanted, kind):
    x = torch.randn(1, 3, 32, 32)
    vitfast.prepare(model, {tuple: (x,), dict: {"x": x}, torch.Tensor: x}[kind])
    assert any(problems for problems in wanted[0].values())


def test_without_a_sample_the_layers_say(model, wanted):
    vitfast.prepare(model)
    assert wanted[0] and not any(wanted[0].values())


def test_autocast_is_asked_for_too(model, wanted):
    with torch.autocast("cpu", torch.bfloat16):
        vitfast.prepare(model, torch.randn(1, 3, 32, 32))
    assert {"float32", "bfloat16"} == {q.dtype for q in wanted[0]}


def test_in_inference_mode_all_the_same(model, wanted):
    with torch.inference_mode():
        vitfast.prepare(model, torch.randn(1, 3, 32, 32))
    assert any(problems for problems in wanted[0].values())


def test_inside_wrappers(model, wanted, monkeypatch):
    """Which would compile, or wait for a backward."""
    monkeypatch.setattr(torch.nn.DataParallel, "forward", lambda *_: pytest.fail("called"))
    compiled = torch.compile(model, backend=lambda *_: pytest.fail("compiled"))
    for wrapped in (torch.nn.DataParallel(model), compiled):
        vitfast.prepare(wrapped, torch.randn(1, 3, 32, 32))
        assert any(problems for problems in wanted.pop().values())


def test_a_failing_model_is_its_own_affair(model, wanted):
    modes = [m.training for m in model.modules()]
    with pytest.raises((RuntimeError, AssertionError, ValueError)):
        vitfast.prepare(model, torch.randn(1, 7, 32, 32))
    assert modes == [m.training for m in model.modules()] and not trust._assumed


def test_bad_arguments(model):
    with pytest.raises(InputTypeError, match=r"torch\.nn\.Module"):
        vitfast.prepare("vit")
    with pytest.raises(InputValueError, match="process group"):
        vitfast.prepare(model, sync=True)


def test_on_a_cpu_there_is_nothing_to_do(model, needs_native):
    report = vitfast.prepare(model, torch.randn(1, 3, 32, 32))
    assert report and report.tested == [] and "trusted by vitfast's own tests" in str(report)
    assert not vitfast.prepare(torch.nn.Identity()).tested


def test_swapping_tests_what_nobody_knows(monkeypatch):
    """On a device that can be tested; the report says what came of it."""
    asked = []

    def decide(device, questions, progress):
        asked.append({q.op for q in questions})
        verdicts = {q: Verdict(RIGHT) for q in questions}
        trust.adopt(device, verdicts)
        return TrustReport("a stand-in", [TrustEntry(q, RIGHT) for q in questions])

    monkeypatch.setattr(native, "reasons", lambda: ["off"])
    monkeypatch.setattr(trust, "interprets", lambda: True)
    monkeypatch.setattr("vitfast.runtime.triton.available", list)
    monkeypatch.setattr(preparation, "decide", decide)
    trust.forget()
    try:
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
        report = swap(model)
        assert "attention" in asked[0] and report.gains_nothing == ""
        assert {entry.note for entry in report.swapped} == {""}
        swap(model)
        assert len(asked) == 1  # all is known
    finally:
        trust.forget()


def agree(rank: int):
    """What a rank doubts, and the states that it reports, with one op right on both ranks."""
    questions = [Question(op, "float32", "forward") for op in ("layer_norm", "grn", "attention")]
    state = {0: (RIGHT, RIGHT, WRONG), 1: (RIGHT, WRONG, RIGHT)}[rank]
    trust.adopt(CPU, {q: Verdict(s, "so") for q, s in zip(questions, state, strict=True)})
    report = session.TrustReport(
        "?", [TrustEntry(q, s) for q, s in zip(questions, state, strict=True)]
    )
    preparation._agree(CPU, questions, report)
    found = {q.op: trust.doubt(q.op, CPU, torch.float32, train=False) for q in questions}
    return found, [entry.state for entry in report.tested]


def test_ranks_use_what_all_of_them_trust(in_ranks):
    found = in_ranks(agree)
    for doubts, states in found.values():
        assert doubts["layer_norm"] == "" and doubts["grn"] and doubts["attention"]
        assert states[0] == RIGHT and RIGHT not in states[1:]
    assert found[0][0]["grn"].startswith("rank 1 leaves it alone: wrong in a test")
