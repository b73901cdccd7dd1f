"""Parameters of shapes that only broadcast, and attributes and methods that hide what is read."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import timm.layers as tl
import torch
from timm.models import beit, convnext, eva, inception_next, swin_transformer_v2
from timm.models.vision_transformer import Block
from torch import nn

from vitfast.swap import swap

C = 24
SCALED = {
    "vit": (lambda: Block(C, 2, init_values=0.3), (2, 10, C), "ls2.gamma"),
    "vit first": (lambda: Block(C, 2, init_values=0.3), (2, 10, C), "ls1.gamma"),
    "eva": (lambda: eva.EvaBlock(C, 2, init_values=0.3), (2, 10, C), "gamma_1"),
    "beit": (lambda: beit.Block(C, 2, init_values=0.3), (2, 10, C), "gamma_2"),
    "convnext": (lambda: convnext.ConvNeXtBlock(C), (2, C, 6, 6), "gamma"),
    "inception": (lambda: inception_next.MetaNeXtBlock(C), (2, C, 6, 6), "gamma"),
    "bias": (lambda: Block(C, 2), (2, 10, C), "mlp.fc2.bias"),
    "logit_scale": (
        lambda: swin_transformer_v2.SwinTransformerV2Block(C, (8, 8), 2, window_size=4),
        (2, 8, 8, C),
        "attn.logit_scale",
    ),
}


def warm(theirs, x):
    ours = copy.deepcopy(theirs)
    swap(ours)
    with torch.no_grad():
        for _ in range(4):
            ours(x)
    return ours


def agree(ours, theirs, x):
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for _ in range(3):
                torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1,), (1, 1, 1), ()], ids=str)
@pytest.mark.parametrize("name", SCALED)
def test_what_broadcasts(lively, name, shape):
    make, size, path = SCALED[name]
    theirs, x = lively(make()).eval(), torch.randn(size)
    ours = warm(theirs, x)
    if path == "gamma" and shape == (1, 1, 1) or (path.endswith("bias") and len(shape) == 3):
        pytest.skip("timm takes no such shape")
    parent, _, last = path.rpartition(".")
    for block in (theirs, ours):
        setattr(block.get_submodule(parent), last, nn.Parameter(torch.full(shape, 0.7)))
    agree(ours, theirs, x)


HIDING = {
    "parameter": lambda b: b.mlp.fc1.__dict__.update(weight=b.mlp.fc1.weight.detach() * 2),
    "child": lambda b: object.__setattr__(b, "mlp", nn.Identity()),
    "grandchild": lambda b: b.mlp.__dict__.update(act=nn.Tanh()),
    "norm": lambda b: b.norm2.__dict__.update(bias=torch.ones(C)),
    "_call_impl": lambda b: _wrap(b.mlp.fc1, "_call_impl"),
    "_call_impl of a norm": lambda b: _wrap(b.norm2, "_call_impl"),
    "_compiled_call_impl": lambda b: setattr(
        b.mlp, "_compiled_call_impl", lambda x, mlp=b.mlp: mlp.forward(x) * 2
    ),
}


def _wrap(module, name):
    original = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: original(*args, **kwargs) * 2)


@pytest.mark.parametrize("kind", HIDING)
def test_what_hides_a_child_or_its_call(lively, kind):
    theirs, x = lively(Block(C, 2)).eval(), torch.randn(2, 10, C)
    ours = warm(theirs, x)
    for block in (theirs, ours):
        HIDING[kind](block)
    agree(ours, theirs, x)


@pytest.mark.parametrize("name", ["__call__", "_call_impl"])
@pytest.mark.parametrize("kind", [nn.Linear, tl.Mlp, nn.Dropout], ids=lambda k: k.__name__)
def test_a_class_that_is_called_by_something_else(lively, monkeypatch, kind, name):
    theirs, x = lively(Block(C, 2)).eval(), torch.randn(2, 10, C)
    ours = warm(theirs, x)
    original = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda *args: original(*args) * 2, raising=False)
    agree(ours, theirs, x)


def test_a_swapped_model_dies_without_the_collector():
    gc.collect()
    gc.disable()
    try:
        model = nn.Sequential(Block(C, 2), nn.Linear(C, C), Block(C, 2))
        model[0].attn.register_forward_hook(lambda *args: None)  # nothing fits for some reason
        swap(model)
        dead = weakref.ref(model)
        del model
        assert dead() is None
    finally:
        gc.enable()
