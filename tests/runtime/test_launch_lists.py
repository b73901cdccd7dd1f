"""Recorded lists of launches in blocks: what they launch, and when they are left for the ops."""

from __future__ import annotations

import threading

import pytest
import timm
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("kernels run in Triton's interpreter", allow_module_level=True)


import vitfast  # noqa: E402
from vitfast import ops  # noqa: E402
from vitfast.blocks import launched  # noqa: E402
from vitfast.engine.products.weights import CACHE  # noqa: E402
from vitfast.errors import BackendUnavailableError  # noqa: E402
from vitfast.plans import Called, Computed  # noqa: E402
from vitfast.runtime import launch_lists, launches, library, trust  # noqa: E402
from vitfast.settings import settings  # noqa: E402
from vitfast.testing.no_launch import launching_nothing  # noqa: E402


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


# ---- what is launched ----------------------------------------------------------------------------


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


def prune(block, tokens):
    """Fewer hidden channels, at the same addresses and strides."""
    block.mlp.fc1.weight.data = block.mlp.fc1.weight.data[:64]
    block.mlp.fc1.bias.data = block.mlp.fc1.bias.data[:64]
    block.mlp.fc2.weight.data = block.mlp.fc2.weight.data[:, :64]


def replace(block, tokens):
    block.norm1.bias = torch.nn.Parameter(torch.zeros(192).half())


OTHER = {
    "moved weight": move,
    "replaced weight": replace,
    "other strides": transpose,
    "other shape": prune,
    "trusted": lambda b, x: trust.adopt(torch.device("cpu"), {}),
    "priority of SDPA's kernels": lambda b, x: torch._C._set_sdp_priority_order([2, 1, 0, 3, 4]),
    "settings": lambda b, x: setattr(settings, "trust", "never"),
    "hook of a child": lambda b, x: b.attn.proj.register_forward_hook(lambda *_: None),
    "tables": lambda b, x: launches.reread_tables(),
    "trust": lambda b, x: trust.refuse(torch.device("cpu"), [], "so"),
    "precision": lambda b, x: torch.set_float32_matmul_precision("high"),
}


@pytest.mark.parametrize("what", OTHER)
def test_a_change_is_seen(swapped, tokens, what, driver, monkeypatch):
    for _ in range(4):
        swapped(tokens)
    before, order = lists(swapped)[-1], torch._C._get_sdp_priority_order()
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
        torch._C._set_sdp_priority_order(order)


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


def test_a_weight_seen_as_another_dtype_goes_to_the_ops(swapped, tokens):
    for _ in range(4):
        swapped(tokens)
    swapped.norm1.weight.data = swapped.norm1.weight.data.view(torch.bfloat16)
    with pytest.raises(BackendUnavailableError):  # what the ops say of it here
        swapped(tokens)


def test_masks_and_causality_are_part_of_a_kind(swapped, tokens, driver):
    mask = torch.zeros(5, 5).half()
    kinds = [{}, {"is_causal": True}, {"attn_mask": mask}, {"attn_mask": mask.mT},
             {"attn_mask": mask.bool()}, {"attn_mask": mask.expand(1, 3, 5, 5)}]  # fmt: skip
    for _ in range(4):
        for kind in kinds:
            swapped(tokens, **kind)
    assert len({id(found) for found in lists(swapped)}) == len(kinds)
    driver.launches.clear()
    other = torch.ones(5, 5).half()
    swapped(tokens, attn_mask=other)
    assert other.data_ptr() in [a for args in driver.launches for a in args]


def test_a_changed_plan_has_no_list(swapped, tokens):
    for _ in range(4):
        swapped(tokens)
    (entry,) = swapped.__dict__["_vitfast_memos"].values()
    plan = entry.kept[0]
    changed = plan._replace(gamma1=None)
    seen = []

    def run(x, plan, **named):
        seen.append(plan)
        return x + 0.0

    for _ in range(5):
        launched.through_list(run, tokens, changed)
    assert seen == [changed] * 5


def test_what_is_made_of_weights_and_kept_is_in_no_list(swapped, tokens):
    swapped(tokens)
    (entry,) = swapped.__dict__["_vitfast_memos"].values()
    plan, noted = entry.kept[0], []

    def run(x, plan):
        CACHE.note(plan.norm1.weight)
        return x + 1.0

    for _ in range(5):
        with CACHE.noting() as kept:
            launched.through_list(run, tokens, plan)
        noted.append(len(kept))
    assert noted == [1] * 5


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
        for _ in range(4):
            assert block(x).requires_grad


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
