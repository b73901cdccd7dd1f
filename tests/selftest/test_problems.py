"""Problems: a recorded call is the call again, its kinds and strides, with other values."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch

from vitfast import ops, swap
from vitfast.runtime import trust
from vitfast.selftest.problems import Described, Problem, problem_of, recording, samples
from vitfast.testing.inputs import materialise

SPECS = [spec for spec in ops.specs() if "triton" in spec.dispatcher.backends]
CASES = [(spec, s) for spec in SPECS for s in spec.samples if not s.tags & {"large", "real"}]


def _described(call):
    return {n: Described.of(t) for n, t in call.tensors()}


@pytest.mark.parametrize(("spec", "sample"), CASES, ids=lambda v: getattr(v, "name", ""))
def test_a_recorded_call_is_the_call(spec, sample):
    """Every sample's call, recorded, through JSON and back, poses itself."""
    call = materialise(spec, sample, torch.float32)
    with recording() as problems, torch.no_grad():
        call.run(spec.public, backend="reference")
    (problem,) = [p for p in problems if p.op == spec.name]
    again = Problem.from_json(json.loads(json.dumps(problem.to_json())))
    assert again == problem and again.name == problem.name
    made = materialise(spec, again.as_sample(), torch.float32)
    expected = _described(call)
    assert {n: d for n, d in _described(made).items() if n in expected} == expected
    with recording() as found, torch.no_grad():
        outputs = made.run(spec.public, backend="reference")
    assert [p for p in found if p.op == spec.name] == [problem]
    if not any(0 in t.shape for t in outputs):
        assert all(t.isfinite().all() for t in outputs)


def test_values_are_the_same_in_every_process():
    problem = Problem("layer_norm", "float32", {"x": Described((3, 8), (8, 1), "float32")})
    spec = ops.spec_of("layer_norm")
    made = [materialise(spec, problem.as_sample(), torch.float32) for _ in range(2)]
    assert torch.equal(made[0].arguments["x"], made[1].arguments["x"])


def test_elements_that_share_a_place_share_a_value():
    like = Described((4, 3, 8), (0, 8, 1), "float32")
    made = Problem("layer_norm", "float32", {"x": like}).as_sample().make(torch.float32, None)[1]
    assert made["x"].stride() == (0, 8, 1) and torch.equal(made["x"][0], made["x"][3])


def test_a_model_poses_each_problem_once():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3).eval()
    theirs = copy.deepcopy(model)
    swap(model)
    x = torch.randn(2, 3, 32, 32)
    with recording() as problems, trust.assuming(), torch.set_grad_enabled(True):
        out = model(x)
    assert len({p.name for p in problems}) == len(problems)
    found = {p.op for p in problems}
    assert {"attention", "add_norm"} <= found and found & {"mlp", "linear_act"}
    torch.testing.assert_close(out, theirs(x), rtol=1e-4, atol=1e-4)
    with recording() as later:
        pass
    model(x)
    assert later == []


def test_an_op_without_kernels_to_test_poses_no_problem():
    q = torch.randn(5, 3, 2, 8)
    with recording() as problems:
        ops.varlen_attention(q, None, None, torch.tensor([0, 2, 5], dtype=torch.int32))
        ops.attention(q[None])
    assert [p.op for p in problems] == ["attention"]


def test_autocast_is_part_of_a_problem():
    x, w = torch.randn(2, 8), torch.randn(4, 8)
    with recording() as problems, torch.autocast("cpu", torch.bfloat16):
        ops.linear_act(x, w)
    (problem,) = problems
    assert problem.autocast == "bfloat16" and problem.dtype == "bfloat16"
    assert problem.arguments["weight"].dtype == "float32"


def test_gradients_are_not_problems_of_their_own():
    x = torch.randn(2, 8, requires_grad=True)
    with recording() as problems:
        ops.layer_norm(x).sum().backward()
    assert [p.op for p in problems] == ["layer_norm"]


def test_bytes_of_a_problem():
    x = torch.randn(4, 8).half()
    call = dict.fromkeys(("weight", "bias", "out_dtype")) | {"x": x, "eps": 1e-6}
    problem = problem_of("layer_norm", {"x": x, **call, "save_stats": False, "backend": "auto"})
    assert problem.bytes == 64 and set(problem.arguments) == {"x"}


@pytest.mark.parametrize("spec", ops.specs(), ids=lambda s: s.name)
def test_every_op_has_samples_small_enough_for_the_interpreter(spec):
    small = samples(spec, "float32", 5e4)
    everything = samples(spec, "float32")
    assert small and all(p in everything for p in small)
