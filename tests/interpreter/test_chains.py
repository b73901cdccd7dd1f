"""Float32 products as a GPU computes them: one chain of multiply-adds, which NumPy's are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import vitfast.ops
from vitfast.ops.attention import triton as attention
from vitfast.ops.attention import triton_kernels as attention_kernels
from vitfast.ops.linear_act import triton as linear_act
from vitfast.ops.linear_act import triton_kernels as linear_act_kernels
from vitfast.ops.patch_embed import triton as patch_embed
from vitfast.ops.patch_embed import triton_kernels as patch_embed_kernels
from vitfast.ops.spec import Sample, randn
from vitfast.runtime.launches import Arch, watching
from vitfast.testing.cases import Case
from vitfast.testing.errors import ErrorReport

HEURISTICS = {
    "attention": attention.launch_heuristic,
    "linear_act": linear_act.launch_heuristic,
    "patch_embed": patch_embed.launch_heuristic,
}


@triton.jit
def merged_dot(acc, a, b, PRECISION: tl.constexpr):
    """One chain over all blocks, which is what Triton makes of acc + a b by itself."""
    return tl.dot(a, b, acc=acc, out_dtype=acc.dtype, input_precision=PRECISION)


@pytest.fixture
def tiles():
    """The tiles of sm_90, cut to few rows."""

    def compiled(kernel, key, launch):
        blocks = HEURISTICS[kernel.split(".")[0]](Arch("sm_90"), dict(key)).blocks
        small = {n: min(size, 16) if n == "BLOCK_M" else size for n, size in blocks.items()}
        return replace(launch, blocks=small)

    with watching(compiled):
        yield


def _linear(depth: int) -> Callable[..., Any]:
    def make(dtype, g):
        weight = randn(g, 64, depth, dtype=dtype, scale=depth**-0.5)
        return (randn(g, 16, depth, dtype=dtype), weight, None, "none"), {}

    return make


def _patches(dtype, g):
    image = randn(g, 1, 3, 128, 128, dtype=dtype)
    return (image, randn(g, 64, 3, 32, 32, dtype=dtype, scale=3072**-0.5)), {}


def _keys(dtype, g):
    return tuple(randn(g, 1, n, 1, 64, dtype=dtype) for n in (16, 4096, 4096)), {}


PROBLEMS = {
    "linear_act of 3072": ("linear_act", linear_act_kernels, _linear(3072)),
    "linear_act of 8192": ("linear_act", linear_act_kernels, _linear(8192)),
    "patch_embed of 3072": ("patch_embed", patch_embed_kernels, _patches),
    "attention over 4096": ("attention", attention_kernels, _keys),
}


def _judge(op: str, make: Callable[..., Any]) -> ErrorReport:
    case = Case(vitfast.ops.spec_of(op), Sample("chain", make, frozenset()), torch.float32)
    (report,) = case.judge(case.outputs(backend="triton"))
    return report


@pytest.mark.usefixtures("chained_products", "tiles")
@pytest.mark.parametrize("problem", PROBLEMS)
def test_each_block_has_a_sum_of_its_own(problem, monkeypatch):
    op, kernels, make = PROBLEMS[problem]
    apart = _judge(op, make)
    assert apart.ok, apart
    monkeypatch.setattr(kernels, "add_dot", merged_dot)
    merged = _judge(op, make)
    assert merged.rms_error > 2 * apart.rms_error
    # patch_embed is compared with a convolution on the CPU, which adds in one chain as well.
    assert op == "patch_embed" or not merged.ok
