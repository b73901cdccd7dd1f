"""Every op through its dispatcher: by name, by setting, disabled, and when a backend cannot."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vitfast.errors import BackendUnavailableError, InputValueError
from vitfast.runtime import native
from vitfast.settings import settings
from vitfast.testing.errors import raise_if_wrong

one_small = pytest.mark.cases(tags=["small"], most=1, dtypes=[torch.float32])


def test_the_reference_is_the_last_backend(spec):
    assert list(spec.dispatcher.backends)[-1] == "reference"
    assert spec.dispatcher.op == spec.name


def test_every_backend_says_whether_it_is_available(spec):
    for backend in spec.dispatcher.backends.values():
        assert all(isinstance(reason, str) and reason for reason in backend.available())
    assert spec.dispatcher.backends["reference"].available() == []


def test_the_native_backend_is_there(spec, needs_native):
    assert spec.dispatcher.backends["cpu"].available() == []


@one_small
def test_an_unknown_backend_is_an_error(case):
    with pytest.raises(InputValueError, match=f"{case.spec.name}: no backend 'abacus'; it has"):
        case.call.run(case.spec.public, backend="abacus")


@one_small
def test_the_setting_chooses(case, monkeypatch):
    picked = []
    for name, backend in case.spec.dispatcher.backends.items():

        def forward(*args, _name=name, _forward=backend.forward):
            picked.append(_name)
            return _forward(*args)

        replaced = dataclasses.replace(backend, forward=forward)
        monkeypatch.setitem(case.spec.dispatcher.backends, name, replaced)
    settings.backend = "reference"
    case.call.run(case.spec.public)
    settings.backend = "auto"
    settings.disable = True
    case.call.run(case.spec.public)
    settings.disable = False
    case.call.run(case.spec.public, backend="reference")
    assert picked == ["reference"] * 3
    case.call.run(case.spec.public)
    assert picked[-1] == next(iter(case.spec.dispatcher.backends)) or native.reasons()


@one_small
def test_disabled_runs_the_reference_bit_for_bit(case):
    settings.disable = True
    for got, want in zip(case.call.run(case.spec.public), case.base, strict=True):
        assert torch.equal(got, want)
    gradients = case.gradients(case.trained)
    for name, got in gradients.items():
        torch.testing.assert_close(got, case.base_gradients[name], msg=name)


@one_small
def test_a_backend_that_cannot_run_is_left_out_quietly_or_raises_by_name(case, monkeypatch):
    backends = case.spec.dispatcher.backends
    for name in [n for n in backends if n != "reference"]:
        reasons = [f"{name} is out of order", "and will be for long"]
        broken = dataclasses.replace(backends[name], can_run=lambda *args, r=reasons: r)
        monkeypatch.setitem(backends, name, broken)
        with pytest.raises(BackendUnavailableError) as caught:
            case.call.run(case.spec.public, backend=name)
        for text in (case.spec.name, name, *reasons):
            assert text in str(caught.value)
        raise_if_wrong(case.judge(case.call.run(case.spec.public)))
        raise_if_wrong(case.judge_gradients(case.gradients(case.trained)))


@one_small
def test_without_the_extension_everything_works(case, monkeypatch):
    why = "native extension not built: no C++ compiler was found"
    monkeypatch.setattr(native, "_load", lambda: (None, why))
    raise_if_wrong(case.judge(case.call.run(case.spec.public)))
    raise_if_wrong(case.judge_gradients(case.gradients(case.trained)))
    with pytest.raises(BackendUnavailableError, match="no C\\+\\+ compiler was found"):
        case.call.run(case.spec.public, backend="cpu")


@one_small
def test_a_backward_uses_the_backend_of_its_forward(case, monkeypatch):
    picked = []
    for name, backend in case.spec.dispatcher.backends.items():
        if backend.backward is None:
            continue

        def backward(*args, _name=name, _backward=backend.backward):
            picked.append(_name)
            return _backward(*args)

        replaced = dataclasses.replace(backend, backward=backward)
        monkeypatch.setitem(case.spec.dispatcher.backends, name, replaced)
    case.gradients(case.trained, backend="reference")
    assert set(picked) == {"reference"}


@pytest.mark.cases(tags=["small", "check", "odd"], dtypes=[torch.float32])
def test_cost_is_positive(case):
    call = case.call
    args = tuple(call.arguments.values())
    cost = case.spec.cost(*case.sample.make(case.dtype, torch.Generator().manual_seed(0)))
    if all(t.numel() for t in args if isinstance(t, torch.Tensor)):
        assert cost.flops > 0 and cost.bytes > 0
