"""The references themselves, and the dtypes and devices that only they serve."""

from __future__ import annotations

import pytest
import torch

from vitfast.testing.errors import raise_if_wrong
from vitfast.testing.inputs import outputs_of


@pytest.mark.cases(tags=["small"], dtypes=[torch.float64])
def test_gradcheck_of_the_reference(case):
    names = case.trained
    call = case.call.float64().requiring_grad(names)

    def function(*tensors):
        return outputs_of(
            call.changed(**dict(zip(names, tensors, strict=True))).run(case.spec.reference)
        )

    inputs = [call.arguments[n] for n in names]
    # Along random directions: element by element it takes a thousand times as long.
    assert torch.autograd.gradcheck(
        function, inputs, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True
    )


@pytest.mark.cases(tags=["small", "check"], dtypes=[torch.float64])
def test_float64_through_the_public_function(case):
    """Some backend serves float64, to float64's precision, gradients included."""
    for got, want in zip(case.call.run(case.spec.public), case.base, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    gradients, wanted = case.gradients(), case.base_gradients
    for name, got in gradients.items():
        if got is not None or wanted[name] is not None:
            torch.testing.assert_close(got, wanted[name], rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.cases(tags=["small", "check"], dtypes=[torch.float16])
def test_float16_through_the_public_function(case):
    raise_if_wrong(case.judge(case.call.run(case.spec.public)))
    raise_if_wrong(case.judge_gradients(case.gradients(case.trained)))


@pytest.mark.cases(tags=["small", "check"])
def test_meta_tensors_give_shapes_and_dtypes(case):
    outputs = case.call.map(lambda t: t.to("meta")).run(case.spec.public)
    for got, want in zip(outputs, case.call.run(case.spec.public), strict=True):
        assert got.device.type == "meta"
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


@pytest.mark.cases(tags=["small", "check"], dtypes=[torch.float32, torch.bfloat16, torch.float64])
def test_the_reference_backend_is_the_reference(case):
    """Whose gradients it makes without autograd, and whose order of memory it may better."""
    outputs = case.outputs(backend="reference")
    gradients = case.gradients(case.trained, backend="reference")
    if case.dtype != torch.float64:
        raise_if_wrong(case.judge(outputs, "reference"))
        raise_if_wrong(case.judge_gradients(gradients, "reference"))
        return
    for got, want in zip(outputs, case.base, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for name, got in gradients.items():
        torch.testing.assert_close(got, case.base_gradients[name], rtol=1e-9, atol=1e-10, msg=name)
