"""Every op inside PyTorch's machinery: opcheck, torch.compile, the rules of autograd."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vitfast.errors import NotTwiceDifferentiableError
from vitfast.testing.errors import raise_if_wrong
from vitfast.testing.inputs import map_tensors


class RegisteredCalls(TorchDispatchMode):
    """Records (op, args) of every `vitfast::` op called inside, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vitfast":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def registered_calls(case, names):
    """The calls of registered ops in a forward (and, with names, a backward) of this case."""
    call = case.call.requiring_grad(names)
    with RegisteredCalls() as recorder:
        outputs = call.run(case.spec.public)
        if names:
            torch.autograd.backward([o for o in outputs if o.requires_grad], case.output_grads)
    return recorder.calls


@pytest.mark.cases(tags=["small"])
def test_opcheck(case):
    """Schema, autograd registration, fake kernels and AOT dispatch of forward and backward op."""
    checked = set()
    for names in ([], case.trained):
        for op, args, kwargs in registered_calls(case, names):
            twice = "backward" in str(op)  # refuses to be differentiated
            args = map_tensors(
                args, lambda t, no=twice: t.detach().requires_grad_(t.requires_grad and not no)
            )
            torch.library.opcheck(op, args, kwargs)
            checked.add(str(op))
    assert f"vitfast.{case.spec.name}.default" in checked
    assert len(checked) == 2, "the backward is a registered op too"


def _compiled(case, **options):
    torch._dynamo.reset()
    names = [n for n, _ in case.call.tensors()]

    def function(*tensors):
        return case.call.changed(**dict(zip(names, tensors, strict=True))).run(case.spec.public)

    return torch.compile(function, fullgraph=True, **options), names


def _train(function, case, names):
    call = case.call.requiring_grad(case.trained)
    outputs = function(*[call.arguments[n] for n in names])
    if case.trained:
        torch.autograd.backward([o for o in outputs if o.requires_grad], case.output_grads)
    grads = [call.arguments[n].grad for n in case.trained]
    return [*outputs, *grads]


def _same(compiled, eager):
    for got, want in zip(compiled, eager, strict=True):
        if want is None:
            assert got is None
            continue
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
        torch.testing.assert_close(got, want)


@pytest.mark.cases(tags=["small"], most=2)
def test_fullgraph_compile(case):
    """The first compiled call, forward and backward, equals the eager one."""
    function, names = _compiled(case, backend="aot_eager")
    eager = _train(lambda *t: case.call.changed(**dict(zip(names, t, strict=True))).run(
        case.spec.public), case, names)  # fmt: skip
    _same(_train(function, case, names), eager)


@pytest.mark.cases(tags=["small"], most=1, dtypes=[torch.float32])
def test_dynamic_compile(case):
    function, names = _compiled(case, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        got = function(*[case.call.arguments[n] for n in names])
        _same(got, case.call.run(case.spec.public))


def test_no_recompilation_for_new_batch_sizes():
    import vitfast.ops as ops

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    function = torch.compile(lambda x, w: ops.layer_norm(x, w), backend=counter, fullgraph=True)
    weight = torch.randn(32)
    for batch in (2, 3, 5, 7, 11):
        x = torch.randn(batch, 9, 32)
        torch.testing.assert_close(function(x, weight), ops.layer_norm(x, weight))
    assert counter.frame_count <= 2


def test_inductor():
    import vitfast.ops as ops

    torch._dynamo.reset()

    def function(x, weight, bias):
        return ops.layer_norm(x * 2, weight, bias).relu()

    x, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((4, 9, 32), (32,), (32,)))
    wanted = torch.autograd.grad(function(x, weight, bias).square().sum(), (x, weight, bias))
    compiled = torch.compile(function, fullgraph=True)
    found = torch.autograd.grad(compiled(x, weight, bias).square().sum(), (x, weight, bias))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.cases(tags=["small"], most=1, dtypes=[torch.float32])
def test_a_gradient_of_a_gradient_is_refused(case):
    call = case.call.requiring_grad(case.trained)
    inputs = [call.arguments[n] for n in case.trained]
    outputs = call.run(case.spec.public)
    grads = torch.autograd.grad(
        sum(o.square().sum() for o in outputs), inputs, create_graph=True, allow_unused=True
    )
    with pytest.raises(NotTwiceDifferentiableError, match="gradients of gradients"):
        sum(g.square().sum() for g in grads if g is not None).backward()


@pytest.mark.cases(tags=["small"], most=1, dtypes=[torch.float32])
def test_changing_a_saved_input_is_noticed(case):
    """Backward raises, or did not need the changed tensor and gives the right gradients."""
    noticed = []
    for name in case.trained:
        call = case.call.requiring_grad(case.trained)
        changed = call.arguments[name] * 1
        inputs = [call.arguments[n] for n in case.trained]
        outputs = call.changed(**{name: changed}).run(case.spec.public)
        with torch.no_grad():
            changed.add_(1)
        try:
            found = torch.autograd.grad(outputs, inputs, case.output_grads, allow_unused=True)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            noticed.append(name)
        else:
            raise_if_wrong(case.judge_gradients(dict(zip(case.trained, found, strict=True))))
    assert noticed


@pytest.mark.cases(tags=["small"], most=1, dtypes=[torch.float32])
def test_backward_twice_through_a_retained_graph(case):
    call = case.call.requiring_grad(case.trained)
    inputs = [call.arguments[n] for n in case.trained]
    outputs = call.run(case.spec.public)
    first, second = (
        torch.autograd.grad(
            outputs, inputs, case.output_grads, retain_graph=True, allow_unused=True
        )
        for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.cases(tags=["small"], most=1, dtypes=[torch.float32])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(case, reentrant):
    call = case.call.requiring_grad(case.trained)
    names = case.trained

    def function(*tensors):
        changed = call.changed(**dict(zip(names, tensors, strict=True)))
        return changed.run(case.spec.public)

    inputs = [call.arguments[n] for n in names]
    outputs = torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=reentrant)
    grads = torch.autograd.grad if not reentrant else None
    if grads is None:
        torch.autograd.backward(outputs, case.output_grads)
        found = [t.grad for t in inputs]
    else:
        found = grads(outputs, inputs, case.output_grads, allow_unused=True)
    for name, got in zip(names, found, strict=True):
        want = case.gradients(names)[name]
        assert got is want is None or torch.equal(got, want)


@pytest.mark.cases(tags=["small"], most=1, dtypes=[torch.float32])
def test_inference_mode(case):
    with torch.inference_mode():
        for got, want in zip(case.call.run(case.spec.public), case.base, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.cases(tags=["small"], most=1, dtypes=[torch.float32])
def test_parameters_that_need_no_gradient_get_none(case):
    name = case.trained[0]
    call = case.call.requiring_grad([name])
    outputs = call.run(case.spec.public)
    torch.autograd.backward([o for o in outputs if o.requires_grad], case.output_grads)
    assert call.arguments[name].grad is not None
    assert all(t.grad is None for n, t in call.tensors() if n != name)
