"""Recorded lists of launches: which memory a step reads and writes."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("kernels run in Triton's interpreter", allow_module_level=True)

from vitfast.runtime import kernel_calls, launch_lists  # noqa: E402
from vitfast.runtime.kernel_calls import Launched, Prepared  # noqa: E402
from vitfast.runtime.launch_lists import record  # noqa: E402
from vitfast.testing.errors import same_bits  # noqa: E402

X, WEIGHT = torch.randn(4, 6), torch.randn(6, 6)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Launcher:
    """Stands for the kernel of one launch: notes the addresses that it is given."""

    def __init__(self):
        self.given = []

    def __call__(self, x, y, z, stream, function, metadata, told, enter, leave, *args):
        self.given.append(args)


def launched(*tensors):
    """As if `kernel_calls.launch` had launched a kernel with these tensors; gives its Launcher."""
    noted, launcher = kernel_calls.recorder.get(), Launcher()
    if noted is not None:
        prepared = Prepared(None, launcher, None, None, ())
        noted.append(Launched(None, 1, tensors, {}, prepared))
    return launcher


def test_results_of_torch_s_ops_are_read_where_they_lie():
    launchers = []

    def function(x):
        y = x + 1.0
        out = torch.empty(3, 6)
        launchers.append(launched(y[1:, 2:], x[2:], WEIGHT[1:], out))
        return out * 1.0

    _, found = record(lambda: function(X), [X], [WEIGHT])
    kept, x = [], torch.randn_like(X)
    with _results(kept):
        found(x)
    ((y, from_x, from_weight, out),) = launchers[0].given
    made, allocated = (t.data_ptr() for t in kept[:2])
    assert y == made + 4 * (6 + 2) and from_x == x[2:].data_ptr()
    assert from_weight == WEIGHT[1:].data_ptr() and out == allocated


class _results(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects what torch's ops give."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.kept.append(out)
        return out


def test_an_allocation_that_an_op_writes_in_part_is_read_where_it_lies():
    launchers = []

    def function(x):
        y = torch.empty(6, 6)
        y[:2] = x[:2]
        launchers.append(launched(x, y[2:]))
        return y + 0.0

    _, found = record(lambda: function(X), [X], [])
    kept = []
    with _results(kept):
        found(X)
    assert launchers[0].given[0][1] == kept[0].data_ptr() + 4 * 12


def test_what_lies_between_kernels_is_aligned():
    sizes, launchers = (1, 3, 5), []

    def function(x):
        before = x
        for n in sizes:
            now = torch.empty(n, dtype=torch.uint8)
            launchers.append(launched(before, now))
            before = now
        out = torch.empty(4)
        launchers.append(launched(before, out))
        return out

    _, found = record(lambda: function(X), [X], [])
    found(X)
    addresses = [launcher.given[0][1] for launcher in launchers[:-1]]
    base = min(addresses)
    assert all((a - base) % launch_lists._ALIGNMENT == 0 for a in addresses)
    assert addresses[0] != addresses[1] != addresses[2]


def test_a_result_that_nobody_wrote_is_not_recorded():
    def function(x):
        launched(x, torch.empty(4))
        return torch.empty(4)

    assert record(lambda: function(X), [X], [])[1] is None


def test_ops_that_ran_in_float32_within_autocast_run_in_float32_again():
    def function(x):
        with torch.autocast("cpu", enabled=False):
            return x @ WEIGHT

    with torch.autocast("cpu", torch.bfloat16):
        _, found = record(lambda: function(X), [X], [WEIGHT])
        assert found(X).dtype == torch.float32 and same_bits(found(X), function(X))


def test_a_list_keeps_no_activation_of_a_call():
    _, found = record(lambda: F.linear(X, WEIGHT).relu() + X, [X], [WEIGHT])

    def call():
        x = torch.randn_like(X)
        return weakref.ref(x), weakref.ref(found(x))

    assert [ref() for ref in call()] == [None, None]


def test_threads_use_memory_of_their_own():
    _, found = record(lambda: (X @ WEIGHT).relu() @ WEIGHT + X, [X], [WEIGHT])
    failed = []

    def work(seed):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        expected = (x @ WEIGHT).relu() @ WEIGHT + x
        with torch.no_grad():
            for _ in range(300):
                if not same_bits(found(x), expected):
                    failed.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_launches_of_threads_get_addresses_of_their_own():
    launchers = []

    def function(x):
        out = torch.empty(4, 6)
        launchers.append(launched(x, out))
        return out

    _, found = record(lambda: function(X), [X], [])
    given = []
    launchers[0].given = given
    first, second = torch.randn(4, 6), torch.randn(4, 6)
    one, other = found(first), found(second)
    assert [args[0] for args in given] == [first.data_ptr(), second.data_ptr()]
    assert [args[1] for args in given] == [one.data_ptr(), other.data_ptr()]
    assert given[0] is not given[1]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.to_sparse().to_dense(),
        lambda x: x.to("meta"),
        lambda x: torch.empty(0).set_(x.untyped_storage(), 0, (4, 6)) + 0.0,
    ],
)
def test_memory_that_is_not_plain_is_not_recorded(function):
    out, found = record(lambda: function(X), [X], [])
    assert found is None and out.shape == X.shape


def test_a_weight_may_be_swapped_once_its_view_is_in_a_list():
    layer = torch.nn.Linear(6, 6)
    weight = layer.weight
    _, found = record(lambda: F.linear(X, weight), [X], [weight])
    assert found is not None
    other = torch.nn.Parameter(torch.zeros(6, 6))
    torch.utils.swap_tensors(weight, other)
    assert not weight.any()
