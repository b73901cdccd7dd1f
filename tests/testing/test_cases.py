"""A case judges an op by its reference: right ones pass, each kind of wrong one is rejected."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vitfast.ops.spec import Cost, OpSpec, Sample, randn
from vitfast.testing.cases import Case
from vitfast.testing.errors import raise_if_wrong


def reference(x, weight=None, *, mask=None, drop_scale=None):
    y = x if weight is None else x * weight
    y = y if mask is None else y + mask
    return y if drop_scale is None else y * drop_scale


def public(x, weight=None, *, mask=None, drop_scale=None, backend="auto"):
    assert backend in ("auto", "cpu")
    out = torch.empty_like(x)
    return out.copy_(reference(x, weight, mask=mask, drop_scale=drop_scale))


def make(dtype, g):
    kwargs = {"mask": randn(g, 6, dtype=dtype), "drop_scale": randn(g, 1, dtype=dtype)}
    return (randn(g, 40, 6, dtype=dtype), randn(g, 6, dtype=dtype)), kwargs


def case(function, tags=(), maker=make, dtype=torch.float32):
    sample = Sample("a", maker, frozenset(tags))
    spec = OpSpec("op", function, reference, None, (sample,), lambda a, k: Cost(1, 1))
    return Case(spec, sample, dtype)


def check(c):
    raise_if_wrong(c.judge(c.outputs()))
    raise_if_wrong(c.judge_gradients(c.gradients()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_right_op_passes(dtype):
    c = case(public, dtype=dtype)
    check(c)
    assert str(c) == f"op-a-{str(dtype)[6:]}"
    assert c.differentiable == ["x", "weight", "mask"]  # drop_scale is a constant
    assert c.trained == ["x", "weight"]


def test_a_wrong_output_names_case_and_backend():
    c = case(lambda *args, **kwargs: public(*args, **kwargs) * 1.01)
    with pytest.raises(AssertionError, match=r"op-a-float32 \(cpu\) out0"):
        raise_if_wrong(c.judge(c.outputs(backend="cpu"), "cpu"))


def test_a_wrong_gradient_names_the_argument():
    def twice(x, weight=None, **kwargs):
        return public(x, weight + (weight - weight.detach()), **kwargs)

    c = case(twice)
    raise_if_wrong(c.judge(c.outputs()))
    with pytest.raises(AssertionError, match="gradient of weight"):
        raise_if_wrong(c.judge_gradients(c.gradients()))


def test_a_missing_gradient_is_wrong():
    c = case(lambda x, weight=None, **kwargs: public(x, weight.detach(), **kwargs))
    with pytest.raises(AssertionError, match="weight has no gradient, the reference has one"):
        c.judge_gradients(c.gradients())


def test_a_gradient_from_nowhere_is_wrong():
    c = case(public)
    c.spec = dataclasses.replace(
        c.spec, reference=lambda x, weight=None, **kwargs: reference(x, weight.detach(), **kwargs)
    )
    with pytest.raises(AssertionError, match="weight has a gradient, the reference has none"):
        c.judge_gradients(c.gradients())


def test_an_unwritten_element_is_wrong():
    def forgetful(x, weight=None, **kwargs):
        kwargs.pop("backend", None)
        out = torch.empty_like(x)
        out[:-1] = reference(x, weight, **kwargs)[:-1]
        return out

    c = case(forgetful)
    with pytest.raises(AssertionError, match=r"\(a\) 6 elements"):
        raise_if_wrong(c.judge(c.outputs()))


def _shifted(t, rows):
    """The rows before or after a tensor's own: outside it."""
    return torch.as_strided(t, t.shape, t.stride(), t.storage_offset() + rows * t.stride(0))


def test_a_read_outside_is_wrong():
    c = case(lambda x, *args, **kwargs: public(_shifted(x.detach(), 1), *args, **kwargs))
    with pytest.raises(AssertionError, match=r"\(a\) 6 elements"):
        raise_if_wrong(c.judge(c.outputs()))


def test_a_write_outside_an_output_is_wrong():
    def overflowing(x, *args, **kwargs):
        out = public(x, *args, **kwargs)
        _shifted(out, 1).copy_(out.clone())
        return out

    with pytest.raises(AssertionError, match="memory outside the tensor was overwritten"):
        case(overflowing).outputs()


@pytest.mark.parametrize("rows", [-1, 0, 1])
def test_a_write_to_or_beside_an_input_is_wrong(rows):
    def scribbling(x, *args, **kwargs):
        out = public(x, *args, **kwargs)
        _shifted(x.detach(), rows).add_(1)
        return out

    c = case(scribbling)
    with pytest.raises(AssertionError, match="overwritten"):
        c.outputs()
    with pytest.raises(AssertionError, match="overwritten"):
        c.gradients()


def test_zero_has_to_be_declared():
    def zeros(dtype, g):
        return (torch.zeros(4, 6, dtype=dtype), torch.ones(6, dtype=dtype)), {}

    with pytest.raises(AssertionError, match="toothless"):
        raise_if_wrong(case(public, maker=zeros).judge(case(public, maker=zeros).outputs()))
    c = case(public, tags=("zero:out0", "zero:weight"), maker=zeros)
    check(c)
    check(case(public, tags=("empty",), maker=lambda d, g: ((torch.zeros(0, 6, dtype=d),), {})))


def test_a_float32_output_of_a_bfloat16_case_is_judged_as_bfloat16():
    """Its error is that of bfloat16 operands: one element at 2.4 times the largest of PyTorch's."""

    def noisy(seed, peak):
        def function(x, weight=None, **kwargs):
            if x.dtype == torch.float64:
                return x
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) * 1e-3
            noise[0, 0] = peak
            return x.float() + noise

        return function

    c = case(noisy(1, 0.012), maker=lambda dtype, g: ((randn(g, 40, 40, dtype=dtype),), {}))
    c.spec = dataclasses.replace(c.spec, reference=noisy(2, 0.005), forward_factor=3.0)
    outputs = c.outputs()
    (report,) = c.judge(outputs)
    assert [p[:3] for p in report.problems] == ["(g)"]
    c.dtype = torch.bfloat16
    raise_if_wrong(c.judge(outputs))
