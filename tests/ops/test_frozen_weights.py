"""Under weights that need no gradient, as below an adapter, nothing is computed for one."""

from __future__ import annotations

import pytest
import torch

from vitfast import ops
from vitfast.ops.common import recompute
from vitfast.ops.common.recompute import Normed
from vitfast.ops.mlp import api as mlp


def refuse(*args, **kwargs):
    raise AssertionError("computed for the gradient of a frozen weight")


@pytest.fixture
def setting():
    """An input of two layers, what it is the norm of, and their weights."""
    g = torch.Generator().manual_seed(0)
    source, weight, bias, first, second = (
        torch.randn(size, generator=g) for size in ((5, 8), 8, 8, (12, 8), (8, 12))
    )
    x = ops.layer_norm(source, weight, bias).requires_grad_()
    return x, Normed(source, weight, bias, 1e-5, "layer"), first, second


@pytest.mark.parametrize("backend", ["cpu", "vendor"])
@pytest.mark.parametrize("op", ["mlp", "linear_act"])
def test_neither_norm_nor_activation_is_computed_again(op, backend, setting, monkeypatch, request):
    if backend == "cpu":
        request.getfixturevalue("needs_native")
    x, normed, first, second = setting

    def out(normed):
        if op == "mlp":
            return ops.mlp(x, first, None, second, None, "gelu", normed=normed, backend=backend)
        return ops.linear_act(x, first, None, "gelu", normed=normed, backend=backend)

    plain, y = out(None), out(normed)
    (wanted,) = torch.autograd.grad(plain.square().sum(), x)
    monkeypatch.setattr(mlp, "_hidden", refuse)
    monkeypatch.setattr(recompute.layer_norm.DISPATCHER, "pick", refuse)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(found, wanted)
