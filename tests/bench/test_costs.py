"""The costs that rates are computed from, against what torch counts and what the kernels move."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitfast.bench import ops
from vitfast.ops.spec import OpSpec, Sample
from vitfast.testing.inputs import outputs_of

PRODUCTS = {"attention", "varlen_attention", "window_attention", "linear_act", "mlp", "patch_embed"}
"""Ops whose work is their products; what else they do is not counted."""
AN_ELEMENT = {
    "layer_norm": 8, "rms_norm": 4, "add_norm": 10, "norm_add": 10, "residual_add": 2,
    "patch_merge": 8, "grn": 6, "group_norm_act": 9,
}  # fmt: skip
"""Flops an element of the result, of ops without products; to a half and a double of it."""


def cases(tag: str) -> list:
    return [
        pytest.param(spec, s, id=f"{spec.name}-{s.name}")
        for spec in ops.specs(None)
        for s in spec.samples
        if tag in s.tags and "empty" not in s.tags
    ]


def made(spec: OpSpec, sample: Sample) -> tuple[tuple, dict]:
    return sample.make(torch.float32, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("spec", "sample"), cases("small"))
def test_flops_are_those_of_the_products(spec, sample):
    args, kwargs = made(spec, sample)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        outputs = outputs_of(spec.reference(*args, **kwargs))
    flops = spec.cost(args, kwargs).flops
    if spec.name in PRODUCTS:
        assert flops == counter.get_total_flops()
    elif spec.name == "dwconv_norm":
        # torch counts the convolution, and no norm.
        elements = outputs[0].numel()
        assert 0 < flops - counter.get_total_flops() <= 10 * elements
    else:
        elements = outputs[-1].numel() if spec.name != "patch_merge" else outputs[0].numel()
        assert counter.get_total_flops() == 0
        gathered = spec.name == "patch_merge" and kwargs["norm"] is None
        each = 1 if gathered else AN_ELEMENT[spec.name]
        assert each / 2 <= flops / elements <= each * 2


@pytest.mark.parametrize(("spec", "sample"), cases("small"))
def test_bytes_are_those_that_go_in_and_come_out(spec, sample):
    """Every input read as often as need be and every output written once."""
    args, kwargs = made(spec, sample)
    with torch.no_grad():
        outputs = outputs_of(spec.reference(*args, **kwargs))
    again = args[:1] if spec.name == "grn" else ()  # once for the norms, once to apply them
    moved = [t for t in (*again, *args, *kwargs.values(), *outputs) if isinstance(t, torch.Tensor)]
    whole = sum(t.numel() * t.element_size() for t in moved)
    # Means, factors and scales of a few elements are left out.
    slack = sum(t.numel() * t.element_size() for t in moved if t.numel() <= 8)
    assert math.isclose(spec.cost(args, kwargs).bytes, whole, abs_tol=slack + 1e-6)
