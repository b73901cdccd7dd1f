"""Recorded lists of launches: what may be recorded, and what a list does."""

from __future__ import annotations

import sys
import weakref

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("kernels run in Triton's interpreter", allow_module_level=True)

import triton.language as tl  # noqa: E402

from vitfast.runtime import kernel_calls, launch_lists  # noqa: E402
from vitfast.runtime.kernel_calls import launch  # noqa: E402
from vitfast.runtime.launch_lists import record  # noqa: E402
from vitfast.runtime.launches import Launch  # noqa: E402
from vitfast.testing.errors import same_bits  # noqa: E402
from vitfast.testing.no_launch import launching_nothing  # noqa: E402

X, WEIGHT = torch.randn(4, 6), torch.randn(6, 6)


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, at < n), at < n)


def copied(x):
    """As if by a kernel; the driver launches nothing."""
    y = torch.empty_like(x)
    launch(copy_kernel, 1, (x, y, x.numel()), {}, Launch({"BLOCK": 32}, 4, 1))
    return y


@pytest.fixture
def driver():
    with launching_nothing() as found, torch.no_grad():
        yield found


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.linear(x, WEIGHT).relu(),
        lambda x: F.linear(x, WEIGHT).relu_().t()[1:],
        lambda x: (x @ WEIGHT.t()).softmax(-1).chunk(2, -1)[1] * 2.0,
        lambda x: torch.cat([x, F.linear(x[1:], WEIGHT)]).reshape(2, -1),
        lambda x: x.new_empty(4, 6).copy_(x[:, :1] + WEIGHT[:4]),
        lambda x: F.scaled_dot_product_attention(*(x.view(1, 1, 4, 6) for _ in range(3))).flatten(),
        lambda x: torch.var_mean(x, -1)[0].unsqueeze(-1) + x,
        lambda x: (x.half() @ WEIGHT.half()).float(),
    ],
)
def test_ops_of_torch_run_again_on_other_inputs(driver, function):
    out, found = record(lambda: function(X), [X], [WEIGHT])
    assert same_bits(out, function(X)) and found.calls_torch
    for _ in range(2):
        x = torch.randn_like(X)
        assert same_bits(found(x), function(x))
    WEIGHT.add_(1.0)  # values are read anew
    assert same_bits(found(X), function(X))


TABLE = torch.randn(6)
SHARED = torch.randn(2, 4, 6)


def edited(x):
    x[0] = 0.0
    return x + 1.0


def edited_weight(x):
    WEIGHT.mul_(1.0)
    return x @ WEIGHT


def past_the_recorder(x):
    y = torch.empty_like(x)
    copy_kernel[(1,)](x, y, x.numel(), BLOCK=32)
    return y + 1.0


def unwritten(x):
    return torch.empty_like(x) + x


def large(x):
    return torch.empty(launch_lists._MOST_BYTES // 4 + 1).fill_(1.0)[:5]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x + 1 if torch.equal(x, x) else x,
        lambda x: x + TABLE,
        lambda x: x.view(6, 4),
        lambda x: WEIGHT.t(),
        lambda x: x,
        edited, edited_weight, past_the_recorder, unwritten, large,
    ],
)  # fmt: skip
def test_what_may_not_run_again_is_not_recorded(driver, function):
    x = X.clone()
    out, found = record(lambda: function(x), [x], [WEIGHT])
    assert found is None and isinstance(out, torch.Tensor)


def test_inputs_that_share_memory_are_not_recorded(driver):
    first, second = SHARED
    assert record(lambda: first + second, [first, second], [])[1] is None
    assert record(lambda: first + second, [first], [second])[1] is None
    assert record(lambda: first[:0] + 1.0, [first[:0]], [])[1] is None


def test_torch_s_own_kernels_need_no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with torch.no_grad():
        _, found = record(lambda: F.linear(X, WEIGHT).relu(), [X], [WEIGHT])
        x = torch.randn_like(X)
        assert same_bits(found(x), F.linear(x, WEIGHT).relu())
        assert not kernel_calls.is_profiled()


def test_an_error_leaves_no_recorder_and_no_mode_behind(driver):
    def fails():
        raise KeyError("so")

    with pytest.raises(KeyError):
        record(fails, [X], [])
    assert not launch_lists.is_recording() and not torch._C._len_torch_dispatch_stack()
    assert not kernel_calls.is_profiled()
    assert record(lambda: copied(X), [X], [])[1] is not None


def test_autocast_casts_in_a_list_as_in_the_call(driver):
    def function(x):
        return F.linear(x, WEIGHT).float() @ WEIGHT

    with torch.autocast("cpu", torch.bfloat16):
        _, found = record(lambda: function(X), [X], [WEIGHT])
        x = torch.randn_like(X)
        assert same_bits(found(x), function(x)) and found(x).dtype == torch.bfloat16


def test_kernels_get_addresses_and_one_piece_of_memory(driver):
    def function(x):
        return copied(copied(copied(x[1:]) + 1.0))

    _, found = record(lambda: function(X), [X], [])
    driver.launches.clear()
    x = torch.randn_like(X)
    out = found(x)
    first, second, third = (args[9:12] for args in driver.launches)
    assert first[0] == x[1].data_ptr() and type(first[0]) is int
    assert second[1] == third[0] and third[1] == out.data_ptr() and out.shape == (3, 6)
    assert first[2] == 18 and len({first[1], second[0], second[1], third[1]}) == 4


def test_a_list_keeps_no_activation(driver):
    seen = []

    def function(x):
        y = copied(x) + 1.0
        seen.extend((weakref.ref(y), weakref.ref(x)))
        return y * 2.0

    def recorded():
        x = torch.randn(4, 6)
        return record(lambda: function(x), [x], [])[1]

    found = recorded()
    driver.launches.clear()
    assert found is not None and [ref() for ref in seen] == [None, None]
