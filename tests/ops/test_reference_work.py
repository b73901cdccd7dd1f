"""What references cost: as many products and convolutions as timm's own modules, and no more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from vitfast import ops

HEAVY = {
    "aten::mm": "product", "aten::addmm": "product", "aten::bmm": "product",
    "aten::_convolution": "convolution", "aten::convolution_backward": "gradient convolution",
}  # fmt: skip


def heavy(run: Callable[..., torch.Tensor], *inputs: torch.Tensor | None) -> Counter:
    """How often a forward of these inputs, and its backward, multiply and convolve."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run(*leaves).square().sum().backward()
    assert all(t is None or t.grad is not None for t in leaves)
    return Counter(HEAVY[e.name] for e in seen.events() if e.name in HEAVY)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("act", ["none", "gelu"])
@pytest.mark.parametrize("backend", ["reference", "vendor"])
def test_a_linear_layer_multiplies_once_forward_and_twice_backward(act, backend):
    inputs = draw(5, 7, 32), draw(48, 32), draw(48)

    def timm(x, weight, bias):
        z = F.linear(x, weight, bias)
        return F.gelu(z) if act == "gelu" else z

    expected = heavy(timm, *inputs)
    assert expected == {"product": 3}
    found = heavy(lambda *t: ops.linear_act(*t, act, backend=backend), *inputs)
    forward = 0 if backend == "vendor" else 1  # oneDNN's own product has another name
    assert found["product"] == forward + 2


def test_a_gated_layer_multiplies_once_for_each_weight():
    inputs = draw(5, 32), draw(48, 32), draw(48), draw(48, 32), draw(48)

    def run(x, weight, bias, gate_weight, gate_bias):
        return ops.linear_act(
            x, weight, bias, "silu", gate_weight=gate_weight, gate_bias=gate_bias,
            backend="reference",
        )  # fmt: skip

    assert heavy(run, *inputs) == {"product": 6}


def test_an_mlp_multiplies_six_times():
    inputs = draw(3, 5, 32), draw(64, 32), draw(64), draw(32, 64), draw(32)
    assert heavy(lambda *t: ops.mlp(*t, "gelu", backend="reference"), *inputs) == {"product": 6}


def test_frozen_weights_cost_no_product():
    weight = draw(48, 32)

    def run(x):
        return ops.linear_act(x, weight, None, "gelu", backend="reference")

    assert heavy(run, draw(5, 32)) == {"product": 2}


@pytest.mark.parametrize("norm", [None, "layer", "rms"])
def test_a_depthwise_convolution_runs_once_and_again_only_under_a_norm(norm):
    """The norm's input is made again for its backward: it is as large as x, which is kept."""
    inputs = [draw(2, 9, 8, 16), draw(16, 1, 7, 7), draw(16)]
    if norm:
        inputs += [draw(16), draw(16) if norm == "layer" else None]

    def run(*tensors):
        return ops.dwconv_norm(*tensors, norm=norm, backend="reference")

    found = heavy(run, *inputs)
    assert found == {"convolution": 2 if norm else 1, "gradient convolution": 1}
