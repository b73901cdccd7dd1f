"""`vitfast check`'s engine: what is right passes, what is wrong or refused is told apart."""

from __future__ import annotations

import pytest
import torch

from vitfast.bench import ops
from vitfast.check import findings, numerics
from vitfast.ops.spec import Sample
from vitfast.runtime.dispatch import Backend


@pytest.fixture
def layer_norm():
    return ops.specs(["layer_norm"])[0]


@pytest.fixture
def sample(layer_norm):
    def make(dtype, generator):
        return (torch.randn(5, 12, generator=generator).to(dtype),), {}

    return Sample("small", make)


def with_backend(monkeypatch, spec, change, **options):
    """The spec's first backend, its forward's result changed."""
    backend = spec.dispatcher.backends["reference"]

    def forward(*args):
        return change(backend.forward(*args))

    wrong = Backend("reference", forward, options.get("can_run", backend.can_run), backend.backward)
    monkeypatch.setitem(spec.dispatcher.backends, "reference", wrong)


def test_every_backend_dtype_and_pass_is_checked(layer_norm, sample):
    found = list(numerics.check_op(layer_norm, sample))
    assert {(f.backend, f.dtype, f.passes) for f in found} == {
        (backend, str(dtype).removeprefix("torch."), passes)
        for backend in layer_norm.dispatcher.backends
        for dtype in layer_norm.dtypes
        for passes in ("forward", "backward")
    }
    assert {f.state for f in found} <= {findings.OK, findings.REFUSED}
    assert sum(f.picked for f in found) == 2 * len(layer_norm.dtypes)


def test_a_wrong_backend_is_found(monkeypatch, layer_norm, sample):
    with_backend(monkeypatch, layer_norm, lambda r: (1.1 * r[0], *r[1:]))
    found = list(numerics.check_op(layer_norm, sample))
    wrong = [f for f in found if f.state == findings.WRONG]
    assert {(f.backend, f.passes) for f in wrong} == {("reference", "forward")}
    assert all(f.error_over_budget > 1 and "max error" in f.reason for f in wrong)


def test_a_crash_is_a_finding(monkeypatch, layer_norm, sample):
    def crash(result):
        raise IndexError("out of range")

    with_backend(monkeypatch, layer_norm, crash)
    wrong = [f for f in numerics.check_op(layer_norm, sample) if f.state == findings.WRONG]
    assert {f.reason for f in wrong} == {"IndexError: out of range"}


def test_a_refusal_is_no_error(monkeypatch, layer_norm, sample):
    with_backend(monkeypatch, layer_norm, tuple, can_run=lambda *args: ["no such engine"])
    refused = [f for f in numerics.check_op(layer_norm, sample) if f.backend == "reference"]
    assert {(f.state, f.reason) for f in refused} == {(findings.REFUSED, "no such engine")}


def test_a_swapped_model_is_checked(monkeypatch):
    monkeypatch.setitem(numerics.MODELS, "vit", "test_vit")
    monkeypatch.setitem(numerics.MODEL_SIZES, "vit", (64, 64))
    found = list(numerics.check_model("vit", torch.float32))
    assert [f.passes for f in found] == ["forward", "backward"]
    assert all(f.state == findings.OK and 0 < f.error_over_budget <= 1 for f in found), found


def test_a_model_of_which_nothing_is_swapped_is_wrong(monkeypatch):
    monkeypatch.setitem(numerics.MODELS, "vit", "test_resnet")
    monkeypatch.setitem(numerics.MODEL_SIZES, "vit", (64, 64))
    monkeypatch.setitem(numerics.MODEL_OPTIONS, "vit", {})
    found = list(numerics.check_model("vit", torch.bfloat16))
    assert [f.state for f in found] == [findings.WRONG]
