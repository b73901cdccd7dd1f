"""What references cost: as many products and convolutions as timm's own modules, and no more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from vitfast import ops
from vitfast.ops.window_attention.reference import relative_index
from vitfast.ops.window_attention.unfused import sums_by_position

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


def test_a_patch_embedding_convolves_once():
    inputs = draw(2, 3, 8, 8), draw(16, 3, 4, 4), draw(16), draw(1, 5, 16), draw(1, 1, 16)

    def run(image, weight, bias, pos_embed, prefix):
        return ops.patch_embed(
            image, weight, bias, pos_embed=pos_embed, prefix=prefix, backend="reference"
        )

    assert heavy(run, *inputs) == {"convolution": 1, "gradient convolution": 1}


@pytest.mark.parametrize("cosine", [False, True], ids=["plain", "cosine"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_window_attention_makes_its_scores_again(frozen, cosine):
    """Two products forward; backward the scores', the weights' gradient, and q's, k's and v's."""
    scale = draw(2) if cosine else None
    qkv = draw(2, 9, 6, 3, 2, 8)

    def run(table, qkv=qkv, scale=scale):
        return ops.window_attention(
            qkv, (4, 4), (2, 1), table, logit_scale=scale, backend="reference"
        )

    if frozen:  # the table's gradient needs the weights and theirs
        assert heavy(run, draw(49, 2)) == {"product": 4}
    else:
        assert heavy(run, draw(49, 2), qkv, scale) == {"product": 7}


@pytest.mark.parametrize("window", [(1, 1), (1, 5), (4, 3), (7, 7)], ids=str)
def test_sums_by_position_are_those_of_the_index(window):
    n = window[0] * window[1]
    x = draw(3, n, n).double()
    table = torch.zeros((2 * window[0] - 1) * (2 * window[1] - 1), 3).double()
    index = relative_index(window, x.device).flatten()
    table.index_add_(0, index, x.flatten(1).T)
    torch.testing.assert_close(sums_by_position(x, window), table)
