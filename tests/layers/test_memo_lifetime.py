"""What a block remembers lives no longer than what it was made of, and keeps nobody else alive."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from timm.models.vision_transformer import Block
from torch import nn

import vitfast
from vitfast.engine import memo
from vitfast.engine.products import weights as weights_cache
from vitfast.engine.replay import Replay
from vitfast.runtime import native

pytestmark = pytest.mark.usefixtures("needs_native")

C = 48


@pytest.fixture(autouse=True)
def empty_cache():
    weights_cache.clear_weight_cache()
    yield
    weights_cache.clear_weight_cache()


def vit():
    module = nn.Sequential(Block(C, 3, qkv_bias=True), Block(C, 3)).eval()
    vitfast.swap(module)
    return module, torch.randn(2, 10, C)


def warm():
    module, x = vit()
    call(module, x, 4)
    assert all(made_by(block) for block in module)
    return module, x


def call(module, x, times=1):
    with torch.no_grad():
        return [module(x) for _ in range(times)][-1]


def by_timm(module, x):
    theirs = pickle.loads(pickle.dumps(module))
    vitfast.restore(theirs)
    return call(theirs, x)


def made_by(module):
    memos = module.__dict__.get(memo._NAME, {}).values()
    return [made for entry in memos if entry.kept for made in entry.kept[1].prepared.values()]


# ---- weights that are exchanged -----------------------------------------------------------------


def test_weights_are_swapped_under_a_warm_model():
    module, x = warm()
    for p in module.parameters():
        torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 1.5 + 0.1))
        torch.testing.assert_close(call(module, x), by_timm(module, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto", "resnetv2_50"])
def test_a_warm_model_is_converted_by_swapping(name):
    size = {"img_size": 56} if "swin" in name else {}
    model = timm.create_model(name, num_classes=3, **size).eval()
    vitfast.swap(model)
    x = torch.randn(1, 3, 56, 56)
    expected = call(model, x, 4)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
        call(model, x.double(), 3)
        model.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    torch.testing.assert_close(call(model, x), expected, rtol=1e-4, atol=1e-4)


class Doubled(nn.Parameter):
    """A weight whose class says what it stands for."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        args = [2 * a.as_subclass(torch.Tensor) if type(a) is cls else a for a in args]
        return func(*args, **(kwargs or {}))


def test_a_weight_swapped_for_one_of_another_class_is_seen():
    module, x = warm()
    weight = module[0].mlp.fc2.weight
    other = weight.detach().clone().as_subclass(Doubled)
    other._is_param = True
    torch.utils.swap_tensors(weight, other)
    assert type(module[0].mlp.fc2.weight) is Doubled
    found = call(module, x)
    with torch.no_grad():
        module[0].mlp.fc2.weight = nn.Parameter(2 * other.detach())
    torch.testing.assert_close(found, by_timm(module, x), rtol=1e-4, atol=1e-4)


# ---- what is freed ------------------------------------------------------------------------------


class Slots:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


OWNERS = {
    "list": lambda model: setattr(model[0], "owner", [model]),
    "tuple": lambda model: setattr(model[0].mlp, "owner", ((model,),)),
    "dict": lambda model: setattr(model[0], "owner", {"deep": {"er": [model]}}),
    "set": lambda model: setattr(model[0].attn, "owner", {model}),
    "slots": lambda model: setattr(model[0], "owner", Slots(model)),
    "weight": lambda model: setattr(model[0].mlp.fc1.weight, "owner", model),
    "hook_of_a_weight": lambda model: model[0].mlp.fc1.weight.register_hook(lambda g: model and g),
    "attribute_of_a_list": lambda model: setattr(model[0], "owner", [model[1], lambda: model]),
}


@pytest.mark.parametrize("owner", OWNERS)
def test_a_model_that_a_block_of_it_refers_to_is_freed(owner):
    model, x = vit()
    OWNERS[owner](model)
    call(model, x, 4)
    assert made_by(model[0])
    ref, packed = weakref.ref(model), len(weights_cache.CACHE)
    assert packed or native.isa() == "baseline"
    del model
    gc.collect()
    assert ref() is None
    assert len(weights_cache.CACHE) == 0


def test_a_model_dies_at_once_without_the_collector():
    model, x = warm()
    storage = weakref.ref(model[0].mlp.fc1.weight.untyped_storage())
    plans = len(memo.memos())
    gc.collect()
    gc.disable()
    try:
        del model
        assert storage() is None
    finally:
        gc.enable()
    assert len(memo.memos()) < plans and len(weights_cache.CACHE) == 0


def test_crowding_while_other_threads_call_new_models():
    """What the cache lets go it looks up among memos that other threads add to meanwhile."""
    before, stop, errors = sys.getswitchinterval(), threading.Event(), []

    def add() -> None:
        while not stop.is_set():
            made = [memo.Memo(torch.nn.Identity(), (), None, ()) for _ in range(50)]
            del made

    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=add) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        end = time.monotonic() + 1.0
        while time.monotonic() < end and not errors:
            try:
                memo._forget_prepared()
            except RuntimeError as error:
                errors.append(error)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(before)
    assert not errors


def to_meta(model):
    model.to("meta")


def other_data(model):
    for p in model.parameters():
        p.data = torch.zeros(0)


def assigned(model):
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def restored(model):
    vitfast.restore(model)
    model.to("meta")


@pytest.mark.parametrize("move", [to_meta, other_data, assigned, nn.Module.double, restored])
def test_nothing_outlives_weights_that_move(move):
    model, _ = warm()
    weights = [weakref.ref(p.untyped_storage()) for p in model.parameters()]
    packed = [
        weakref.ref(t.untyped_storage())
        for entry in weights_cache.CACHE._entries.values()
        for t in ([*entry.packed] if isinstance(entry.packed, tuple) else [entry.packed])
        if isinstance(t, torch.Tensor) and t.layout is torch.strided
    ]
    assert packed
    gc.disable()
    try:
        move(model)
        assert not any(ref() is not None for ref in (*weights, *packed))
    finally:
        gc.enable()
    assert not made_by(model[0]) and len(weights_cache.CACHE) == 0


@pytest.fixture
def impatient():
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def at_once(work, threads=4):
    """Runs work(i) on threads that start together; raises what one of them does."""
    start = threading.Barrier(threads)

    def begin(i):
        start.wait()
        work(i)

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(begin, i) for i in range(threads)]:
            future.result()


def test_threads_that_meet_a_fresh_model_leave_nothing(impatient):
    for _ in range(10):
        model, x = vit()
        at_once(lambda i, model=model, x=x: call(model, x, 2))
        storages = [weakref.ref(p.untyped_storage()) for p in model.parameters()]
        del model
        gc.collect()
        assert not [ref for ref in storages if ref() is not None]
        assert len(weights_cache.CACHE) == 0


def test_a_pickle_needs_no_memo():
    module, _ = warm()
    vitfast.restore(module)
    assert b"vitfast" not in pickle.dumps(module)
    vitfast.swap(module)
    call(module, torch.randn(2, 10, C), 4)
    for child in module.modules():  # by hand, as users do
        child.__class__ = getattr(type(child), "timm_class", type(child))
    assert b"vitfast.layers" not in pickle.dumps(module)


# ---- threads ------------------------------------------------------------------------------------


def test_another_thread_may_meet_a_new_kind_of_input_at_any_time():
    """Between any two bytecodes of one that meets a ninth kind."""
    module, _ = vit()
    left = steps = 0

    def traced(frame, event, arg):
        nonlocal left
        if frame.f_code is not memo.Memo.prepare.__code__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                found.prepared["theirs"] = memo._Prepared(None)
        return traced

    while left <= 0:
        steps += 1
        left = steps
        found = memo.Memo(module, (), None, ())
        for n in range(memo._MOST_KINDS):
            found.prepare(n, lambda: None)
        before = sys.gettrace()
        sys.settrace(traced)
        try:
            assert found.prepare("ours", lambda: 5).value == 5
        finally:
            sys.settrace(before)
        assert "ours" in found.prepared and len(found.prepared) <= memo._MOST_KINDS + 1
    assert steps > 50


ASSIGNING = """
    import faulthandler, threading, time
    import torch
    from timm.models.vision_transformer import Block
    import vitfast

    faulthandler.enable()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = Block(768, 12, qkv_bias=True, init_values=0.1).eval()
    module.requires_grad_({training})
    vitfast.swap(module)
    x = torch.randn(4, 197, 768)
    # Large enough for the C library to unmap them when they are freed.
    for layer in (module.norm1, module.norm2):
        layer.weight.data = torch.empty(32 << 20)[:768].fill_(1)
        layer.bias.data = torch.empty(32 << 20)[:768].fill_(0)
    seen = [layer.weight for layer in (module.norm1, module.norm2)]
    seen += [layer.bias for layer in (module.norm1, module.norm2)]
    with torch.set_grad_enabled({training}):
        for _ in range(4):
            module(x)
    done = False

    def assign():
        while not done:
            for p in seen:
                fresh = torch.empty(32 << 20)[:768]
                fresh.copy_(p.detach())
                p.data = fresh
                del fresh

    thread = threading.Thread(target=assign)
    thread.start()
    end = time.monotonic() + 6
    with torch.set_grad_enabled({training}):
        while time.monotonic() < end:
            module(x)
    done = True
    thread.join()
"""


@pytest.mark.parametrize("training", [False, True])
def test_another_thread_may_assign_to_the_data_of_a_weight(training):
    script = textwrap.dedent(ASSIGNING).format(training=training)
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_a_replay_reads_no_storage_that_was_given_up(monkeypatch):
    """Where a thread assigns to a weight's `data` between the look at it and the kernels."""
    module, x = warm()
    expected = call(module, x)
    weight = module[0].norm1.weight
    run, gone = Replay.__call__, []

    def assigned(self, *inputs):
        if not gone:
            gone.append(weakref.ref(weight.untyped_storage()))
            weight.data = torch.full_like(weight, float("nan"))
            gone.append(gone[0]() is not None)
        return run(self, *inputs)

    monkeypatch.setattr(Replay, "__call__", assigned)
    torch.testing.assert_close(call(module, x), expected, rtol=0, atol=0)
    assert gone[1]
    assert gone[0]() is None
    assert call(module, x).isnan().all()


def test_an_address_keeps_its_storage():
    t = torch.randn(3, 4)
    address, storage = native.address(t[1:]), weakref.ref(t.untyped_storage())
    assert int(address) == t.data_ptr() + 16
    t.data = torch.zeros(2)
    assert storage() is not None
    del address
    assert storage() is None
    assert native.address(None) == 0
    with pytest.raises((AttributeError, TypeError)):
        native.address(5)
