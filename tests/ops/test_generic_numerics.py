"""Every op, sample, dtype and backend against float64; layouts of memory; repeatability."""

from __future__ import annotations

import pytest
import torch

from vitfast.errors import BackendUnavailableError
from vitfast.testing.cases import Case
from vitfast.testing.errors import raise_if_wrong
from vitfast.testing.inputs import LAYOUTS, with_layout
from vitfast.testing.refusals import may_refuse


def backends(case: Case) -> list[str]:
    return [name for name in case.spec.dispatcher.backends if name != "reference"]


def check_refusal(
    case: Case, backend: str, error: BackendUnavailableError, backward: bool = False
) -> None:
    assert may_refuse(case, backend, backward), f"{case} on {backend} has to run: {error}"
    assert f"{case.spec.name}: backend {backend!r}" in str(error) and "- " in str(error)


def test_forward(case):
    ran = []
    for backend in backends(case):
        try:
            outputs = case.outputs(backend=backend)
        except BackendUnavailableError as error:
            check_refusal(case, backend, error)
            continue
        ran.append(outputs)
        raise_if_wrong(case.judge(outputs, backend))
    automatic = case.outputs()
    if not ran:
        raise_if_wrong(case.judge(automatic))
    for a, b in zip(automatic, ran[0] if ran else automatic, strict=True):
        assert torch.equal(a, b), "auto must be the first backend that can run"
    for got, base in zip(automatic, case.base, strict=True):
        assert got.is_contiguous() or not base.is_contiguous()


def test_gradients(case):
    """Of what models train, on each backend; of every floating argument, on whichever can."""
    if not case.trained:
        pytest.skip("nothing to differentiate")
    ran = False
    for backend in backends(case):
        try:
            gradients = case.gradients(case.trained, backend=backend)
        except BackendUnavailableError as error:
            check_refusal(case, backend, error, backward=True)
            continue
        raise_if_wrong(case.judge_gradients(gradients, backend))
        ran = True
    if not ran or case.trained != case.differentiable:
        raise_if_wrong(case.judge_gradients(case.gradients()))


@pytest.mark.cases(tags=["small", "check"], real=False)
def test_one_gradient_alone(case):
    """Asking for one gradient only gives the same as asking for all of them."""
    for name in case.trained:
        raise_if_wrong(case.judge_gradients(case.gradients([name])))


@pytest.mark.cases(tags=["small", "check"], real=False)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_inputs(case, layout):
    """Each input in another memory layout, forward and backward, one at a time."""
    for name in case.call.floating():
        t = case.call.arguments[name]
        changed = with_layout(t, layout)
        if changed is t or changed.numel() == 0:
            continue
        call = case.call.changed(**{name: changed})
        raise_if_wrong(case.judge(case.outputs(call)))
        raise_if_wrong(case.judge_gradients(case.gradients(case.trained, call)))


@pytest.mark.cases(tags=["small", "check"], real=False)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_output_gradients(case, layout):
    changed = [with_layout(g, layout) for g in case.output_grads]
    gradients = case.call.gradients(case.spec.public, changed, names=case.trained)
    raise_if_wrong(case.judge_gradients(gradients))


@pytest.mark.cases(tags=["small", "check"], real=False)
def test_expanded_output_gradients(case):
    """sum().backward() sends a gradient of stride 0."""
    if any(o.numel() == 0 for o in case.base):
        pytest.skip("empty")
    ones = [torch.ones((), dtype=o.dtype).expand(o.shape) for o in case.base]
    expanded = case.call.gradients(case.spec.public, ones, names=case.trained)
    dense = case.call.gradients(
        case.spec.public, [o.contiguous() for o in ones], names=case.trained
    )
    for name in case.trained:
        if dense[name] is not None:
            torch.testing.assert_close(expanded[name], dense[name])


@pytest.mark.cases(tags=["small", "check"], real=False)
def test_inputs_are_never_written(case):
    call = case.call.requiring_grad(case.trained)
    before = {n: (t._version, t.detach().clone()) for n, t in call.tensors()}
    outputs = call.run(case.spec.public)
    grads = [g.clone() for g in case.output_grads]
    if case.trained:
        torch.autograd.backward([o for o in outputs if o.requires_grad], grads)
    for name, t in call.tensors():
        version, values = before[name]
        assert t._version == version, name
        assert torch.equal(t.detach(), values), name
    assert all(torch.equal(a, b) for a, b in zip(grads, case.output_grads, strict=True))


@pytest.mark.cases(tags=["small", "check"])
def test_the_same_bits_on_every_run_and_thread_count(case):
    results = []
    for threads in (2, 1, 2, 1, *(12 * [2])):
        torch.set_num_threads(threads)
        with torch.no_grad():
            outputs = case.call.run(case.spec.public)
        gradients = case.gradients(case.trained)
        results.append([*outputs, *(g for g in gradients.values() if g is not None)])
    for other in results[1:]:
        for first, again in zip(results[0], other, strict=True):
            assert torch.equal(first, again)


@pytest.mark.cases(tags=["small", "check"], real=False)
def test_forward_is_the_same_with_and_without_gradients(case):
    with torch.no_grad():
        without = case.call.run(case.spec.public)
    recorded = case.call.requiring_grad(case.trained).run(case.spec.public)
    for a, b in zip(without, recorded, strict=True):
        assert torch.equal(a, b)
        assert b.requires_grad == bool(case.trained)
