"""Inputs of generic tests: reproducible, with true float64 twins."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from vitfast.ops.spec import Cost, OpSpec, Sample, randn
from vitfast.testing.inputs import LAYOUTS, OpCall, materialise, seed_of, with_layout


def double_it(x, weight=None, *, mask=None, out_dtype=None, backend="auto"):
    y = x * 2 if weight is None else x * weight
    y = y.masked_fill(~mask, 0) if mask is not None else y
    return y.to(out_dtype or x.dtype)


def _make(dtype, g):
    x = randn(g, 4, 6, dtype=dtype)
    return (x, randn(g, 6, dtype=dtype)), {"mask": x > 0, "out_dtype": torch.float32}


SPEC = OpSpec(
    name="double_it",
    public=double_it,
    reference=double_it,
    dispatcher=None,
    samples=(Sample("a", _make),),
    cost=lambda args, kwargs: Cost(0, 0),
)


@pytest.fixture
def call() -> OpCall:
    return materialise(SPEC, SPEC.samples[0], torch.bfloat16)


def test_the_same_names_give_the_same_numbers_in_every_process(call):
    again = materialise(SPEC, SPEC.samples[0], torch.bfloat16)
    assert all(
        torch.equal(a, b) for (_, a), (_, b) in zip(call.tensors(), again.tensors(), strict=True)
    )
    code = "from vitfast.testing.inputs import seed_of; print(seed_of('a', 1, 'float32'))"
    env_seeds = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
    }
    assert env_seeds == {f"{seed_of('a', 1, 'float32')}\n"}
    assert seed_of("a") != seed_of("b")


def test_other_samples_and_dtypes_give_other_numbers(call):
    other = materialise(SPEC, Sample("b", _make), torch.bfloat16)
    assert not torch.equal(other.arguments["x"], call.arguments["x"])
    assert seed_of("op", "a", torch.float32) != seed_of("op", "a", torch.bfloat16)


def test_arguments_are_bound_by_name_without_backend(call):
    assert list(call.arguments) == ["x", "weight", "mask", "out_dtype"]
    assert "backend" not in call.signature.parameters
    assert call.floating() == ["x", "weight"]
    (y,) = call.run(double_it, backend="reference")
    assert y.dtype == torch.float32 and y.shape == (4, 6)


def test_the_float64_twin_has_the_same_values(call):
    twin = call.float64()
    assert twin.arguments["x"].dtype == torch.float64
    assert torch.equal(twin.arguments["x"].bfloat16(), call.arguments["x"])
    assert twin.arguments["mask"].dtype == torch.bool
    assert twin.arguments["out_dtype"] == torch.float64
    assert twin.run(double_it)[0].dtype == torch.float64


def test_gradients(call):
    grads = call.output_grads(call.run(double_it))
    assert all(torch.equal(a, b) for a, b in zip(grads, call.output_grads(grads), strict=True))
    found = call.float64().gradients(double_it, grads)
    x, weight, mask = (call.arguments[n] for n in ("x", "weight", "mask"))
    torch.testing.assert_close(found["x"], grads[0].double() * weight.double() * mask)
    torch.testing.assert_close(found["weight"], (grads[0].double() * x.double() * mask).sum(0))
    assert not call.arguments["x"].requires_grad


def test_a_missing_gradient_is_none(call):
    assert call.gradients(lambda x, weight, mask, out_dtype: x.sin())["weight"] is None
    assert call.gradients(lambda x, weight, mask, out_dtype: x.detach()) == {
        "x": None,
        "weight": None,
    }


def test_changed_and_mapped_calls_leave_the_original(call):
    assert call.changed(weight=None).arguments["weight"] is None
    assert call.map(torch.zeros_like).arguments["x"].eq(0).all()
    assert call.arguments["weight"] is not None and not call.arguments["x"].eq(0).all()


@pytest.mark.parametrize("shape", [(4,), (4, 6), (2, 4, 6), (2, 3, 4, 6), (1, 1, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_the_values(layout, shape):
    t = torch.randn(shape)
    other = with_layout(t, layout)
    assert torch.equal(other, t)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_really_differ(layout):
    t = torch.randn(2, 4, 6)
    other = with_layout(t, layout)
    assert other.stride() != t.stride() or other.storage_offset() != 0
