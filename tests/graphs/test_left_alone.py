"""Calls of a graphed model that are not replayed: what a graph cannot do, or could not be made."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vitfast
from tests.graphs.models import capture, images, plain, same, vit
from vitfast.graphs import explain, store

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Subclass(torch.Tensor):
    pass


def _recorded(model, x):
    with torch.enable_grad():
        out = model(x)
    assert out.requires_grad


def _input_with_gradient(model, x):
    for p in model.parameters():
        p.requires_grad_(False)
    with torch.enable_grad():
        assert model(x.clone().requires_grad_()).requires_grad


def _watched(model, x):
    with _Watching():
        model(x)


def _with_global_hook(model, x):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(1))
    try:
        model(x)
    finally:
        handle.remove()
    assert len(seen) > 10


def _training(model, x):
    model.train()
    model(x)
    model.eval()


def _compiled(model, x):
    assert same(torch.compile(model, backend="eager", fullgraph=True)(x), plain(model, x))


def _traced(model, x):
    traced = torch.jit.trace(model, x, check_trace=False)
    assert same(traced(x), plain(model, x))


def _exported(model, x):
    assert same(torch.export.export(model, (x,)).module()(x), plain(model, x))


PLAIN_CALLS = {
    "recorded by autograd": _recorded,
    "input with gradient": _input_with_gradient,
    "watched": _watched,
    "global hook": _with_global_hook,
    "training": _training,
    "compiled": _compiled,
    "traced": _traced,
    "exported": _exported,
    "vmap": lambda model, x: torch.vmap(model)(x[None]),
    "subclass": lambda model, x: model(x.as_subclass(_Subclass)),
    "elsewhere": lambda model, x: copy.deepcopy(model).to("meta")(x.to("meta")),
}


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("how", PLAIN_CALLS)
def test_what_a_graph_cannot_do_is_called_as_ever(fake, how):
    model = vitfast.graphed(vit())
    capture(model, images())
    log = list(fake.log)
    for _ in range(3):
        PLAIN_CALLS[how](model, images())
    assert fake.log == log


@pytest.mark.usefixtures("no_grad")
def test_another_capture_is_left_alone(fake):
    model = vitfast.graphed(vit())
    capture(model, images())
    log = list(fake.log)
    fake.capturing = True
    model(images())
    fake.capturing = False
    with store._CAPTURING:  # of another model's
        for _ in range(3):
            model(images(5))
    assert fake.log == log
    model(images(5))
    assert fake.count("capture") == 2


def test_without_gradients_to_record_grad_mode_may_be_on(fake):
    model = vitfast.graphed(vit().requires_grad_(False))
    capture(model, images())
    assert fake.count("replay") == 1
    model.head.weight.requires_grad_()
    assert model(images()).requires_grad and fake.count("replay") == 1
    model.head.weight.requires_grad_(False)
    model(images())
    assert fake.count("replay") == 2


class Deciding(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


class Writing(nn.Module):
    def forward(self, x):
        return x.add_(1) * 2


class Counting(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.calls


class Opaque(nn.Module):
    def forward(self, x):
        return iter([x + 1])


CANNOT = {
    "decides by values": (Deciding(), "not permitted when stream is capturing"),
    "writes to its input": (Writing(), "writes to its inputs"),
    "changes itself": (Counting(), "its forward changes the model"),
    "gives something else": (Opaque(), "its result holds a builtins.list_iterator"),
}


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("what", CANNOT)
def test_what_cannot_be_captured_warns_once_and_is_called_as_ever(fake, what):
    module, why = CANNOT[what]
    model = vitfast.graphed(module.eval())
    model(torch.ones(3))
    with pytest.warns(RuntimeWarning, match=why) as told:
        model(torch.ones(3))
    assert len(told) == 1
    captures = fake.count("capture")
    for _ in range(600):
        model(torch.ones(3))
    assert fake.count("capture") == captures and fake.count("replay") == 0
    assert why in explain(model)


@pytest.mark.usefixtures("no_grad")
def test_decisions_by_values_stay_right(fake):
    model = vitfast.graphed(Deciding().eval())
    model(torch.ones(3))
    with pytest.warns(RuntimeWarning):
        model(torch.ones(3))
    assert same(model(-torch.ones(3)), -2 * torch.ones(3))


@pytest.mark.usefixtures("no_grad")
def test_a_capture_that_fails(fake):
    model = vitfast.graphed(vit())
    model(images())
    fake.fail_capture = RuntimeError("CUDA error: operation failed\nmore")
    with pytest.warns(RuntimeWarning, match="CUDA error: operation failed$"):
        assert same(model(images()), plain(model, images()))
    fake.fail_capture = None
    for _ in range(3):
        model(images())
    assert fake.count("capture") == 1
    capture(model, images(3))
    assert fake.count("replay") == 1


@pytest.mark.usefixtures("no_grad")
def test_no_memory_for_a_graph_gives_up_the_others(fake):
    model = vitfast.graphed(vit())
    capture(model, images())
    model(images(3))
    fake.fail_capture = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.warns(RuntimeWarning, match="out of memory"):
        model(images(3))
    assert len(fake.graphs) == 0


@pytest.mark.usefixtures("no_grad")
def test_a_replay_that_fails(fake):
    model = vitfast.graphed(vit())
    capture(model, images())
    fake.fail_replay = True
    with pytest.warns(RuntimeWarning, match="its replay failed: RuntimeError: CUDA error"):
        assert same(model(images(seed=1)), plain(model, images(seed=1)))
    fake.fail_replay = False
    assert len(fake.graphs) == 0 and same(model(images(seed=2)), plain(model, images(seed=2)))
