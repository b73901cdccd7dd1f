"""`define` registers schema, implementation, fake kernel and autograd of one op."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vitfast.errors import NotTwiceDifferentiableError
from vitfast.runtime import native
from vitfast.runtime.library import autocast_args, autocast_dtype, define, needs_grad


@pytest.fixture(scope="module")
def op():
    """vitfast::_test_scale: x * factor."""

    def backward(ctx, grad):
        return backward_op(grad, ctx.factor), None

    def setup(ctx, inputs, output):
        ctx.factor = inputs[1]

    backward_op = define(
        "_test_scale_backward",
        "(Tensor grad, float factor) -> Tensor",
        lambda grad, factor: grad * factor,
        lambda grad, factor: torch.empty_like(grad),
    )
    return define(
        "_test_scale",
        "(Tensor x, float factor) -> Tensor",
        lambda x, factor: x * factor,
        lambda x, factor: torch.empty_like(x),
        setup_context=setup,
        backward=backward,
    )


def test_the_op_is_registered_and_runs(op):
    assert str(op.op) == "vitfast._test_scale.default"
    assert torch.ops.vitfast._test_scale.default is op.op
    assert torch.equal(op(torch.ones(3), 2.0), torch.full((3,), 2.0))
    assert torch.Tag.pt2_compliant_tag in op.op.tags


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Counted(torch.Tensor):
    pass


def test_eager_inference_calls_the_implementation_itself_unless_someone_looks(monkeypatch):
    at_once = []

    def double(x):
        here = inspect.stack()[1].filename
        at_once.append(here.endswith("vitfast/runtime/library.py"))
        return x * 2

    op = define("_test_double", "(Tensor x) -> Tensor", double, torch.empty_like)
    x = torch.ones(3)
    with torch.no_grad():
        assert torch.equal(op(x), x * 2) and at_once.pop() == (native.extension() is not None)
        with Seen() as seen:
            op(x)
        assert "vitfast::_test_double" in seen.names and not at_once.pop()
        with torch.profiler.profile() as profiler:
            op(x)
        assert "vitfast::_test_double" in [e.name for e in profiler.events()]
        assert not at_once.pop()
        op(x.as_subclass(Counted))
        assert not at_once.pop()
        negative = torch._neg_view(x)
        assert torch.equal(op(negative), -2 * x) and not at_once.pop()
        assert torch.equal(torch.vmap(op)(x[None]), 2 * x[None]) and not at_once.pop()
    op(x)
    assert not at_once.pop()


def test_autograd(op):
    x = torch.randn(3, requires_grad=True)
    op(x, 3.0).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 3.0))
    assert not op(torch.randn(3), 3.0).requires_grad


def test_a_gradient_of_a_gradient_is_refused(op):
    x = torch.randn(3, requires_grad=True)
    (g,) = torch.autograd.grad(op(x, 3.0).square().sum(), x, create_graph=True)
    with pytest.raises(NotTwiceDifferentiableError, match="vitfast::_test_scale_backward"):
        g.sum().backward()


def test_opcheck(op):
    torch.library.opcheck(op.op, (torch.randn(4, 3, requires_grad=True), 0.5))


def test_meta_tensors(op):
    assert op(torch.empty(5, 2, device="meta"), 2.0).shape == (5, 2)


def test_needs_grad():
    x, y = torch.zeros(2, requires_grad=True), torch.zeros(2)
    assert needs_grad(y, None, x)
    assert not needs_grad(y, None)
    with torch.no_grad():
        assert not needs_grad(x)
    with torch.inference_mode():
        assert not needs_grad(x)


def test_autocast_dtype_and_casts():
    cpu = torch.device("cpu")
    tensors = [
        torch.zeros(2),
        None,
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, dtype=torch.float16),
    ]
    assert autocast_dtype(cpu) is None
    assert all(t is s for t, s in zip(autocast_args(cpu, tensors), tensors, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_dtype(cpu) == torch.bfloat16
        cast = autocast_args(cpu, tensors)
    assert [t if t is None else t.dtype for t in cast] == [
        torch.bfloat16,
        None,
        torch.float64,
        torch.int64,
        torch.bfloat16,
    ]


def test_casts_match_what_torch_casts():
    """As torch.nn.functional.linear under autocast: the result's dtype follows the same rule."""
    a, w = torch.randn(2, 3), torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        ours = [t.dtype for t in autocast_args(a.device, (a, w))]
        assert torch.nn.functional.linear(a, w).dtype == ours[0] == ours[1]


def test_casting_keeps_the_graph():
    x = torch.randn(3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (y,) = autocast_args(x.device, (x,))
    y.sum().backward()
    assert x.grad.dtype == torch.float32
