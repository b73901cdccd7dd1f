"""Each kernel under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer."""

import pytest
import torch

import vitfast.ops

FORMS = {
    "normed in several warps": dict(shape=(1, 3, 9, 40), size=7),
    "odd channels, two strips": dict(shape=(2, 2, 3, 33), size=3),
    "a kernel larger than the map": dict(shape=(1, 2, 2, 5), size=11),
    "not normed": dict(shape=(1, 4, 5, 70), size=5, norm=None),
    "rows through memory": dict(shape=(1, 2, 3, 390), size=9),
    "narrow strips": dict(shape=(1, 3, 4, 388), size=7),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_nothing_outside_and_no_race(sanitized, form):
    form = dict(form)
    shape, size = form.pop("shape"), form.pop("size")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, requires_grad=True)
    weight = torch.randn(shape[-1], 1, size, size, generator=g, requires_grad=True)
    found, expected = (
        vitfast.ops.dwconv_norm(x, weight, backend=backend, **form)
        for backend in ("cuda", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    grad = torch.randn(expected.shape, generator=g)
    for of, to in zip(
        torch.autograd.grad(found, (x, weight), grad),
        torch.autograd.grad(expected, (x, weight), grad),
        strict=True,
    ):
        torch.testing.assert_close(of, to, rtol=1e-3, atol=1e-3)
