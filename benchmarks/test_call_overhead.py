"""What the boundary of a registered op costs a call, for a signature as long as a real op's."""

from __future__ import annotations

import pytest
import torch

from vitfast.runtime.library import define

SCHEMA = (
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? gamma, float eps, bool first, bool second,"
    " str backend) -> Tensor"
)
OTHERS = (None, None, None, 1e-6, True, False, "auto")


def _body(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    gamma: torch.Tensor | None,
    eps: float,
    first: bool,
    second: bool,
    backend: str,
) -> torch.Tensor:
    return torch.empty_like(x)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _backward(ctx, grad):
    return grad, *(None for _ in OTHERS)


_LIBRARY = torch.library.Library("vitfast_benchmarks", "DEF")


def _registered():
    """`Library.define` with torch.library.register_autograd."""
    name = "vitfast_benchmarks::registered"
    _LIBRARY.define(f"registered{SCHEMA}")
    _LIBRARY.impl("registered", _body, "CompositeExplicitAutograd")
    torch.library.register_fake(name, _body, lib=_LIBRARY)
    torch.library.register_autograd(name, _backward, setup_context=_setup_context, lib=_LIBRARY)
    return torch.ops.vitfast_benchmarks.registered.default


def _custom():
    """`torch.library.custom_op`."""
    op = torch.library.custom_op(
        "vitfast_benchmarks::custom", _body, mutates_args=(), schema=SCHEMA
    )
    op.register_fake(_body)
    op.register_autograd(_backward, setup_context=_setup_context)
    return op


PROVIDERS = {
    "function": _body,
    "vitfast": define(
        "benchmark", SCHEMA, _body, _body, backward=_backward, setup_context=_setup_context
    ),
    "register_autograd": _registered(),
    "custom_op": _custom(),
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("grad", [False, True], ids=["not recorded", "recorded"])
def test_call_overhead(benchmark, grad: bool, provider: str) -> None:
    call = PROVIDERS[provider]
    x = torch.zeros(16, requires_grad=grad)
    benchmark.group = f"call overhead, {'recorded' if grad else 'not recorded'} by autograd"
    with torch.set_grad_enabled(grad):
        benchmark.pedantic(call, args=(x, *OTHERS), rounds=100, iterations=50, warmup_rounds=2)
