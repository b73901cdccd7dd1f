"""Recorded lists of launches: what may be recorded, what a list launches, when it is left."""

from __future__ import annotations

import sys
import threading

import pytest
import timm
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("kernels run in Triton's interpreter", allow_module_level=True)

import triton.language as tl  # noqa: E402

import vitfast  # noqa: E402
from vitfast import ops  # noqa: E402
from vitfast.blocks import launched  # noqa: E402
from vitfast.plans import Called, Computed  # noqa: E402
from vitfast.runtime import kernel_calls, launch_lists, launches, library, trust  # noqa: E402
from vitfast.runtime.kernel_calls import launch  # noqa: E402
from vitfast.runtime.launch_lists import record  # noqa: E402
from vitfast.runtime.launches import Launch  # noqa: E402
from vitfast.settings import settings  # noqa: E402
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


@pytest.fixture
def swapped(driver):
    """A ViT block, and calls of it by Triton's kernels."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, init_values=1e-5)
    block = model.eval().half().blocks[0]
    vitfast.swap(block)
    settings.backend = "triton"
    yield block
    block.__dict__.pop("_vitfast_memos", None)


@pytest.fixture
def tokens():
    return torch.zeros(1, 5, 192, dtype=torch.float16)


def lists(block):
    (entry,) = block.__dict__["_vitfast_memos"].values()
    return [kind.list for kind in entry.kept[1].lists.values()]


# ---- what is recorded ----------------------------------------------------------------------------


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


# ---- what is launched ----------------------------------------------------------------------------


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


def test_a_block_s_list_launches_what_the_ops_launch(swapped, tokens, driver):
    for _ in range(3):
        swapped(tokens)
    driver.launches.clear()
    with library.watching(lambda name, arguments: None):
        swapped(tokens)
    by_ops, x = list(driver.launches), tokens.clone()
    driver.launches.clear()
    swapped(x)
    assert len(by_ops) == len(driver.launches) == 8
    weights = {p.data_ptr() for p in swapped.parameters()}
    for ours, theirs in zip(driver.launches, by_ops, strict=True):
        assert ours[:6] == theirs[:6] and len(ours) == len(theirs)
        for a, b in zip(ours[9:], theirs[9:], strict=True):
            if not isinstance(b, torch.Tensor):
                assert a == b and type(a) is type(b)
            elif b.data_ptr() in weights:
                assert a == b.data_ptr()
            else:
                assert a % 16 == b.data_ptr() % 16 == 0
    assert driver.launches[0][9] == x.data_ptr()


def test_a_list_runs_no_op_and_allocates_twice(swapped, tokens, monkeypatch):
    for _ in range(3):
        swapped(tokens)
    made = []
    for name in ("empty", "empty_strided"):
        own = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, own=own, **k: made.append(a) or own(*a, **k))
    monkeypatch.setattr(ops, "linear_act", None)
    monkeypatch.setattr(torch._ops.OpOverload, "__call__", None)
    assert swapped(tokens).shape == tokens.shape and len(made) == 2


# ---- when it is left -----------------------------------------------------------------------------


def move(block, tokens):
    block.mlp.fc1.weight.data = block.mlp.fc1.weight.data.clone()


def transpose(block, tokens):
    block.attn.proj.weight.data = block.attn.proj.weight.data.t()


def replace(block, tokens):
    block.norm1.bias = torch.nn.Parameter(torch.zeros(192).half())


OTHER = {
    "moved weight": move,
    "replaced weight": replace,
    "other strides": transpose,
    "hook of a child": lambda b, x: b.attn.proj.register_forward_hook(lambda *_: None),
    "tables": lambda b, x: launches.reread_tables(),
    "trust": lambda b, x: trust.refuse(torch.device("cpu"), [], "so"),
    "precision": lambda b, x: torch.set_float32_matmul_precision("high"),
}


@pytest.mark.parametrize("what", OTHER)
def test_a_change_is_seen(swapped, tokens, what, driver, monkeypatch):
    for _ in range(4):
        swapped(tokens)
    before = lists(swapped)[-1]
    called = []
    own = launch_lists.LaunchList.__call__
    monkeypatch.setattr(
        launch_lists.LaunchList, "__call__", lambda self, *i: called.append(self) or own(self, *i)
    )
    swapped(tokens)
    assert called == [before]
    try:
        OTHER[what](swapped, tokens)
        swapped(tokens)
        assert called == [before]
        if what != "hook of a child":
            for _ in range(3):
                swapped(tokens)
            assert called[-1] is not before and len(called) >= 2
    finally:
        torch.set_float32_matmul_precision("highest")


CALLS = {
    "shape": lambda x: torch.zeros(1, 6, 192).half(),
    "batch": lambda x: torch.zeros(2, 5, 192).half(),
    "strides": lambda x: torch.zeros(1, 192, 5).half().mT,
    "address": lambda x: torch.zeros(5 * 192 + 1).half()[1:].view(1, 5, 192),
    "dtype": lambda x: x.float(),
}


@pytest.mark.parametrize("what", CALLS)
def test_another_kind_of_call_has_a_list_of_its_own(swapped, tokens, what):
    if what == "dtype":
        swapped.float()
        tokens = tokens.float()
        other = tokens.half()
        swapped.half()
    else:
        other = CALLS[what](tokens)
    for x in (tokens, other) * 4 if what != "dtype" else (other,) * 4:
        assert swapped(x).shape == x.shape
    assert len({id(found) for found in lists(swapped)}) == (1 if what == "dtype" else 2)
    assert None not in lists(swapped)


def test_a_list_that_cannot_be_launched_is_left_for_the_ops(swapped, tokens, monkeypatch):
    for _ in range(3):
        swapped(tokens)

    def fails(self, *inputs):
        raise RuntimeError(message)

    monkeypatch.setattr(launch_lists.LaunchList, "__call__", fails)
    message = "an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal"):
        swapped(tokens)
    message = "Triton Error [CUDA]: out of memory"
    assert swapped(tokens).shape == tokens.shape
    assert lists(swapped) == [None] and swapped(tokens).shape == tokens.shape


def test_what_calls_a_module_has_no_list(swapped, tokens):
    """A module's own forward may do another thing each time."""
    swapped(tokens)
    (entry,) = swapped.__dict__["_vitfast_memos"].values()
    plan = entry.kept[1].plan
    assert not launched._calls_modules(plan)
    joined = Computed(torch.cat, (tokens,))
    fc1 = plan.mlp.fc1._replace(bias=joined)
    assert not launched._calls_modules(plan._replace(mlp=plan.mlp._replace(fc1=fc1)))
    for mlp in (
        plan.mlp._replace(act_module=torch.nn.GELU()),
        plan.mlp._replace(fc2=Called("a hook")),
        Called("a hook"),
    ):
        assert launched._calls_modules(plan._replace(mlp=mlp))


def test_kinds_are_bounded(swapped):
    for n in range(1, 30):
        swapped(torch.zeros(1, n, 192).half())
    assert len(lists(swapped)) == launched._MOST_KINDS


def profiled(block, x):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        block(x)


def hooked(block, x):
    chain = triton.knobs.runtime.launch_enter_hook
    note = [].append
    chain.add(note)
    try:
        block(x)
    finally:
        chain.remove(note)


def watched(block, x):
    with library.watching(lambda *_: None):
        block(x)


def tuned(block, x):
    with launches.watching(lambda kernel, key, config: config):
        block(x)


def asked(block, x):
    with launches.asking():
        block(x)


def recorded(block, x):
    with torch.enable_grad():
        block(x)


@pytest.mark.parametrize("call", [profiled, hooked, watched, tuned, asked, recorded])
def test_whoever_watches_sees_the_ops(swapped, tokens, call, monkeypatch):
    for _ in range(4):
        swapped(tokens)
    monkeypatch.setattr(launch_lists.LaunchList, "__call__", None)
    call(swapped, tokens)
    with pytest.raises(TypeError):
        swapped(tokens)


def test_threads_record_and_issue_at_once(swapped, driver):
    failed = []

    def work(n):
        try:
            with torch.no_grad():
                for _ in range(6):
                    assert swapped(torch.zeros(1, n, 192).half()).shape == (1, n, 192)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(1 + i % 3,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_list_keeps_no_activation(driver):
    import weakref

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
