"""Recorded native calls: what is run again, and where its intermediates lie."""

from __future__ import annotations

import os
import sys
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitfast.engine import replay
from vitfast.engine.replay import __file__, is_recording, record
from vitfast.ops.common import norm as norm_op
from vitfast.runtime import native
from vitfast.runtime.recordings import lay_out

pytestmark = pytest.mark.usefixtures("needs_native")


def twice_normed(x):
    inner = norm_op.forward(norm_op.KINDS["layer"], x)[1]
    return norm_op.forward(norm_op.KINDS["rms"], inner.view(x.shape))[1]


def test_a_replay_gives_the_same_for_other_inputs():
    x = torch.randn(5, 33)
    out, again = record(twice_normed, x)
    torch.testing.assert_close(out, twice_normed(x), rtol=0, atol=0)
    for other in (torch.randn(5, 33), torch.full((5, 33), float("inf"))):
        found = again(other)
        torch.testing.assert_close(found, twice_normed(other), rtol=0, atol=0, equal_nan=True)
    assert not is_recording()


def test_weights_are_read_where_they_lie():
    weight, x = torch.randn(33), torch.randn(5, 33)

    def run(x):
        return norm_op.forward(norm_op.KINDS["layer"], x, weight=weight)[1]

    _, again = record(run, x)
    weight.mul_(3)
    torch.testing.assert_close(again(x), run(x), rtol=0, atol=0)


COMPUTING = {
    "torch": lambda x: twice_normed(x + 1),
    "torch_after": lambda x: twice_normed(x).mul_(2),
    "copy": lambda x: twice_normed(x.t().contiguous().t().contiguous()),
    "other_native": lambda x: (native.native().selected_isa(), twice_normed(x))[1],
    "input_itself": lambda x: x,
    "part_of_what_it_allocates": lambda x: twice_normed(x)[1:],
    "nothing": lambda x: None,
}


@pytest.mark.parametrize("function", COMPUTING)
def test_what_is_not_only_kernels_is_not_replayed(function):
    x = torch.randn(5, 33)
    with torch.no_grad():
        out, again = record(COMPUTING[function], x)
        assert again is None
        torch.testing.assert_close(out, COMPUTING[function](x), rtol=0, atol=0)


def test_addresses_that_could_be_sizes_are_not_replayed(monkeypatch):
    x = torch.randn(5, 33)
    monkeypatch.setattr(replay, "_LEAST_ADDRESS", x.data_ptr() + 1)
    assert record(twice_normed, x)[1] is None


def test_an_error_leaves_nothing_behind():
    with pytest.raises(ZeroDivisionError):
        record(lambda x: 1 / 0, torch.zeros(2, 3))
    assert not is_recording()
    assert record(twice_normed, torch.randn(2, 3))[1] is not None


def test_other_threads_are_not_recorded():
    x, others = torch.randn(5, 33), []

    def run(x):
        worker = threading.Thread(target=lambda: others.append(twice_normed(x * 2) + 1))
        worker.start()
        worker.join()
        return twice_normed(x)

    _, again = record(run, x)
    torch.testing.assert_close(others[0], twice_normed(x * 2) + 1, rtol=0, atol=0)
    torch.testing.assert_close(again(x), twice_normed(x), rtol=0, atol=0)
    assert len(others) == 1


def test_a_recording_within_a_recording_is_none():
    inner = []

    def run(x):
        inner.append(record(twice_normed, x)[1])
        return twice_normed(x)

    assert record(run, torch.randn(2, 3))[1] is not None
    assert inner == [None]


def test_two_threads_record_at_once():
    meet = threading.Barrier(2, timeout=20)
    found = {}

    def work(i):
        def run(x):
            meet.wait()
            out = twice_normed(x)
            meet.wait()
            return out

        found[i] = record(run, torch.full((2, 3), float(i)))[1]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    x = torch.randn(2, 3)
    for again in found.values():
        torch.testing.assert_close(again(x), twice_normed(x), rtol=0, atol=0)


def test_an_interrupt_anywhere_leaves_nothing_behind():
    """Ctrl-C arrives between any two bytecodes."""
    x, steps = torch.randn(2, 3), 0
    twice_normed(x)

    def traced(frame, event, arg):
        nonlocal left
        if frame.f_code.co_filename != __file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and threading.current_thread() is threading.main_thread():
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return traced

    while True:
        steps += 1
        left = steps
        before = sys.gettrace()
        sys.settrace(traced)
        try:
            record(lambda x: x, x)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        assert not is_recording() and not torch._C._len_torch_dispatch_stack()
        assert native.native() is native._load()[0]
        if left > 0:
            break
    assert steps > 50
    assert record(twice_normed, x)[1] is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_while_a_thread_records_is_not_recording():
    records, forked = threading.Event(), threading.Event()

    def run(x):
        records.set()
        forked.wait(20)
        return x

    worker = threading.Thread(target=record, args=(run, torch.randn(2, 3)))
    worker.start()
    assert records.wait(20)
    child = os.fork()
    if child == 0:
        again = record(twice_normed, torch.randn(2, 3))[1]
        os._exit(0 if again is not None and native.native() is native._load()[0] else 1)
    forked.set()
    worker.join()
    assert os.waitpid(child, 0)[1] == 0


uses = st.lists(st.integers(0, 9), min_size=0, max_size=4).map(sorted)


# No limit of time: a busy machine may take a second for one draw.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(1, 1000), uses), max_size=8))
def test_buffers_in_use_at_the_same_time_do_not_overlap(buffers):
    sizes = [size for size, _ in buffers]
    users = [calls for _, calls in buffers]
    offsets, total = lay_out(sizes, users, 64)
    spans = [range(o, o + s) for o, s in zip(offsets, sizes, strict=True)]
    assert all(offset % 64 == 0 for offset in offsets)
    for i, calls in enumerate(users):
        if not calls:
            continue
        assert spans[i].stop <= total
        for k in range(i):
            if users[k] and calls[0] <= users[k][-1] and users[k][0] <= calls[-1]:
                assert spans[i].stop <= spans[k].start or spans[k].stop <= spans[i].start
    rounded = [-(-size // 64) * 64 for size, calls in buffers if calls]
    assert total <= max(sum(rounded), 1)
