"""Judging a problem: what is wrong, refused or failed, by the backend that is under test."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vitfast import ops
from vitfast.runtime.verdicts import FAILED, RIGHT, WRONG
from vitfast.selftest.judge import NO_MEMORY, REFUSED, judge, plain_arithmetic
from vitfast.selftest.problems import Described, Problem, recording
from vitfast.selftest.timing import measure

CPU = torch.device("cpu")
SPEC = ops.spec_of("layer_norm")
SAMPLE = Problem("layer_norm", "float32", {}, sample="prime_width")


@pytest.fixture
def planted(monkeypatch):
    """Put a backend "triton" in the op, made of the reference with some part changed."""
    right = SPEC.dispatcher.backends["reference"]

    def plant(**changes) -> None:
        backend = dataclasses.replace(right, name="triton", **changes)
        monkeypatch.setitem(SPEC.dispatcher.backends, "triton", backend)

    plant.right = right
    return plant


@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_what_is_right(planted, passes):
    planted()
    found = judge(SAMPLE, passes, CPU)
    assert found.state == RIGHT and 0 <= found.error_over_budget <= 1 and not found.broken


def test_a_recorded_call_under_autocast_is_right():
    """Its base runs under autocast too, so that rounded weights are no error."""
    x, w = torch.randn(2, 24), torch.randn(4, 24)
    with recording() as problems, torch.autocast("cpu", torch.bfloat16):
        ops.linear_act(x, w, act="gelu")
    for passes in ("forward", "backward"):
        found = judge(problems[0], passes, CPU, backend="reference")
        assert found.state == RIGHT, found


def test_what_is_wrong(planted):
    planted(forward=lambda call: tuple(t * 1.01 for t in planted.right.forward(call)))
    found = judge(SAMPLE, "forward", CPU)
    assert found.state == WRONG and found.error_over_budget > 1 and found.reason


def test_a_wrong_gradient(planted):
    planted(backward=lambda *args: tuple(2 * t for t in planted.right.backward(*args)))
    assert judge(SAMPLE, "forward", CPU).state == RIGHT
    assert judge(SAMPLE, "backward", CPU).state == WRONG


def test_other_bits_in_a_repeat(planted):
    calls = iter(range(100))

    def drifting(call):
        out, *rest = planted.right.forward(call)
        return out + next(calls) * 1e-7, *rest

    planted(forward=drifting)
    found = judge(SAMPLE, "forward", CPU)
    assert found.state == WRONG and "other bits in out0" in found.reason


def test_an_element_that_was_never_written(planted):
    def lazy(call):
        out, *rest = planted.right.forward(call)
        fresh = torch.empty(out.shape)
        fresh[..., :-1] = out[..., :-1]
        return fresh, *rest

    planted(forward=lazy)
    assert judge(SAMPLE, "forward", CPU).state == WRONG


def test_a_write_outside(planted):
    def beyond(call):
        out, *rest = planted.right.forward(call)
        wide = torch.empty(out.shape)
        wide.copy_(out)
        torch.as_strided(wide, (1,), (1,), wide.storage_offset() + wide.numel()).fill_(0.0)
        return wide, *rest

    planted(forward=beyond)
    found = judge(SAMPLE, "forward", CPU)
    assert found.state == WRONG and "outside" in found.reason


class CompilationError(Exception):
    __module__ = "triton.compiler.errors"


@pytest.mark.parametrize(
    ("error", "state"),
    [(CompilationError("at 1:2"), FAILED), (RuntimeError("an illegal memory access"), FAILED),
     (torch.cuda.OutOfMemoryError("no room"), NO_MEMORY)],
    ids=["compiler", "crash", "memory"],
)  # fmt: skip
def test_what_raises(planted, error, state):
    def forward(call):
        raise error

    planted(forward=forward)
    found = judge(SAMPLE, "forward", CPU)
    assert found.state == state and str(error) in found.reason


def test_what_is_refused(planted):
    planted(can_run=lambda call: ["only on Sundays"])
    found = judge(SAMPLE, "forward", CPU)
    assert found.state == REFUSED and found.reason == "only on Sundays"


def test_times_of_all_that_could_run(planted, monkeypatch):
    """By the clock that is given, each in turn; what fails has no time."""
    planted()
    seen = []

    def clock(call):
        call()
        seen.append(call.args[0])
        return {"triton": 1.0, "reference": 2.0}[call.args[0]]

    for passes in ("forward", "backward"):
        found = measure(SAMPLE, passes, CPU, clock)
        assert found.seconds == {"triton": 1.0, "reference": 2.0} and found.asked == []
    assert seen[:4] == ["triton", "reference"] * 2
    planted(can_run=lambda call: ["not today"])
    assert measure(SAMPLE, "forward", CPU, clock).seconds == {}


def test_a_problem_that_cannot_be(planted):
    bad = Problem("layer_norm", "float32", {"x": Described((2, 3), (3, 1), "int64")})
    assert judge(bad, "forward", CPU).state == FAILED


def test_plain_arithmetic_is_torchs_own_again_afterwards():
    before = torch.backends.cudnn.allow_tf32
    with plain_arithmetic():
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert torch.backends.cudnn.allow_tf32 is before
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
