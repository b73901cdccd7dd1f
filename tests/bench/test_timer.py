"""The timer's arithmetic, on a clock that only the calls move."""

from __future__ import annotations

import pytest

from vitfast.bench.timer import Timing, WallStopwatch, interleave
from vitfast.errors import InputValueError


class FakeMachine:
    """Contenders that take a known time, in the order in which they were called."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now

    def call(self, name: str, *seconds: float):
        """A call that takes these times in turn, the last one for ever."""
        left = list(seconds)

        def run() -> str:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return f"{name}{len(self.calls)}"

        return run


@pytest.fixture
def machine() -> FakeMachine:
    return FakeMachine()


def timed(machine: FakeMachine, calls, **options):
    return interleave(calls, watch=WallStopwatch(machine.clock), **options)


def test_contenders_take_turns(machine):
    timed(machine, {n: machine.call(n, 1.0) for n in "abc"}, seconds=6.0, min_rounds=1)
    assert "".join(machine.calls) == "abc" + "abc" * 2


def test_a_turn_of_short_calls_may_begin_with_one_that_is_not_timed(machine):
    calls = {"a": machine.call("a", 0.01), "b": machine.call("b", 1.0)}
    found = timed(machine, calls, seconds=4.0, settle=True, min_rounds=1)
    assert "".join(machine.calls) == "aab" + "aab" * 4
    assert found["a"].samples == pytest.approx([0.01] * 4)
    machine.calls.clear()
    timed(machine, {"a": calls["a"]}, seconds=1e-9, settle=True, min_rounds=3)
    assert len(machine.calls) == 2 + 3


def test_medians_are_per_call_and_outliers_do_not_move_them(machine):
    found = timed(
        machine,
        {"a": machine.call("a", 9.0, 2.0, 2.0, 70.0, 2.0), "b": machine.call("b", 1.0)},
        seconds=1e-9,
        min_rounds=4,
    )
    assert found["a"].samples == (2.0, 2.0, 70.0, 2.0)  # the 9 s of the first call are no sample
    assert found["a"].median == 2.0
    assert found["b"].median == 1.0
    assert list(found) == ["a", "b"]


def test_short_calls_are_repeated_within_a_sample(machine):
    found = timed(machine, {"a": machine.call("a", 5.0, 1e-6)}, seconds=1e-9, min_rounds=2)
    assert found["a"].median == pytest.approx(1e-6)
    # A slow first call says nothing of the others, but this one was too slow to ask again.
    assert len(machine.calls) == 3
    machine.calls.clear()
    timed(machine, {"a": machine.call("a", 1e-6)}, seconds=1e-9, min_rounds=2)
    assert len(machine.calls) == 2 + 2 * 200


def test_the_budget_ends_the_rounds(machine):
    found = timed(machine, {"a": machine.call("a", 1.0)}, seconds=10.0, max_rounds=100)
    assert len(found["a"].samples) == 10
    found = timed(machine, {"a": machine.call("a", 1.0)}, seconds=10.0, max_rounds=4)
    assert len(found["a"].samples) == 4


def test_the_budget_counts_every_call_of_a_sample(machine):
    """200 calls of 1 us are 0.2 ms of the budget, not 1 us."""
    found = timed(machine, {"a": machine.call("a", 1e-6)}, seconds=1e-3, max_rounds=10_000)
    assert 5 <= len(found["a"].samples) <= 6
    assert len(machine.calls) <= 2 + 6 * 200
    calls = {"a": machine.call("a", 1e-6), "b": machine.call("b", 1e-4)}
    machine.calls.clear()
    found = timed(machine, calls, seconds=4e-3, min_rounds=1, max_rounds=10_000)
    assert len(found["a"].samples) == len(found["b"].samples) == 10


def test_every_number_is_of_one_call(machine):
    calls = {"a": machine.call("a", 1e-6), "b": machine.call("b", 3e-5), "c": machine.call("c", 1)}
    found = timed(machine, calls, seconds=1e-9, min_rounds=4)
    for name, seconds in {"a": 1e-6, "b": 3e-5, "c": 1.0}.items():
        assert found[name].samples == pytest.approx([seconds] * 4)
        assert found[name].quartiles == pytest.approx((seconds, seconds))
        assert found[name].iqr == pytest.approx(0, abs=1e-9)


def test_outputs_are_checked_before_and_after(machine):
    seen = []
    timed(
        machine,
        {"a": machine.call("a", 1.0)},
        seconds=1e-9,
        check=lambda name, output: seen.append((name, output)),
    )
    assert seen == [("a", "a1"), ("a", "a4")]  # the first and the last of 1 + 3 calls


def test_a_result_that_goes_wrong_later_is_found(machine):
    def refuse(name, output):
        if output == "a4":
            raise AssertionError(output)

    with pytest.raises(AssertionError, match="a4"):
        timed(machine, {"a": machine.call("a", 1.0)}, seconds=1e-9, check=refuse)


def test_contenders_that_ran_are_not_warmed_up_again(machine):
    calls = {"a": machine.call("a", 1.0), "b": machine.call("b", 1.0)}
    timed(machine, calls, seconds=1e-9, min_rounds=2, ran_before={"a": 1.0})
    assert "".join(machine.calls) == "b" + "ab" * 2


def test_progress_grows_to_one(machine):
    shares = []
    timed(machine, {"a": machine.call("a", 1.0)}, seconds=5.0, on_progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(shares) == 5


@pytest.mark.parametrize(
    "calls, options",
    [
        ({}, {}),
        ({"a": int}, {"seconds": 0.0}),
        ({"a": int}, {"seconds": float("nan")}),
        ({"a": int}, {"min_rounds": 0}),
        ({"a": int}, {"min_rounds": 5, "max_rounds": 4}),
    ],
)
def test_senseless_budgets_are_refused(calls, options):
    with pytest.raises(InputValueError):
        interleave(calls, **options)


def test_quartiles():
    timing = Timing((4.0, 1.0, 3.0, 2.0, 5.0))
    assert timing.quartiles == (2.0, 4.0)
    assert timing.iqr == 2.0
    assert Timing((7.0,)).quartiles == (7.0, 7.0)
