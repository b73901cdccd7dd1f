"""The statistics of Triton's attention forward as a log-sum-exp, for another backend's backward."""

from __future__ import annotations

import pytest
import torch

from vitfast import ops
from vitfast.ops.attention import triton, vendor
from vitfast.ops.attention.reference import Call
from vitfast.testing.inputs import materialise

NAMES = ("tokens_17", "causal", "bias_small", "mask_float_full", "mask_queries", "norm_rms_small",
         "rope_small")  # fmt: skip
SPEC = ops.spec_of("attention")


@pytest.mark.parametrize("name", NAMES)
def test_it_is_that_of_the_scores(name):
    sample = next(s for s in SPEC.samples if s.name == name)
    given = materialise(SPEC, sample, torch.float32).arguments
    options = {n: v or "" if n == "qk_norm" else v for n, v in given.items()}
    call = Call(**{**Call._field_defaults, **dict.fromkeys(Call._fields), **_plain, **options})
    call = call.scaled()
    _, stats = triton.forward(call)
    q, k, _ = vendor.prologue(call)
    problem = vendor._problem(call, q, k, q)
    scores = (problem.q.double() @ problem.k.double().mT) * call.factor
    if problem.mask is not None:
        mask = problem.mask
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    if problem.is_causal:
        scores = scores.masked_fill(~vendor.causal_keep(q, k), -torch.inf)
    expected = scores.logsumexp(-1)
    expected = torch.where(expected.isneginf(), torch.inf, expected)
    found = vendor.lse_of_sums(call, stats)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


_plain = {"is_causal": False, "qk_norm": "", "qk_norm_eps": 1e-6, "rope_prefix": 0,
          "rope_half": False, "save_stats": True, "mask_grad": False, "bias_grad": False,
          "rope_grad": False}  # fmt: skip


def test_rows_beyond_what_is_known_are_seen():
    call = Call(**{**dict.fromkeys(Call._fields), **_plain})
    stats = torch.tensor([[1.0, 2.0**27, 2.0**27, -torch.inf], [2.0, 1.0, 0.0, 0.0]])
    lse = vendor.lse_of_sums(call, stats)
    assert lse[0].isfinite() and lse[1].isnan() and lse[2:].isposinf().all()
