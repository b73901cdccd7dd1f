"""What a hook in the first half of a block does to the second half, in the same call."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models import beit, convnext, edgenext, eva, swin_transformer, swin_transformer_v2
from timm.models.vision_transformer import Block
from torch import nn

from vitfast.swap import swap

C = 24
BLOCKS = {
    "vit": (lambda: Block(C, 2), (2, 10, C), "attn"),
    "eva": (lambda: eva.EvaBlock(C, 2), (2, 10, C), "attn"),
    "beit": (lambda: beit.Block(C, 2), (2, 10, C), "attn"),
    "swin": (
        lambda: swin_transformer.SwinTransformerBlock(C, (8, 8), 2, window_size=4),
        (2, 8, 8, C),
        "attn",
    ),
    "swin_v2": (
        lambda: swin_transformer_v2.SwinTransformerV2Block(C, (8, 8), 2, window_size=4),
        (2, 8, 8, C),
        "attn",
    ),
    "convnext": (lambda: convnext.ConvNeXtBlock(C), (2, C, 6, 6), "conv_dw"),
    "convnext_v2": (
        lambda: convnext.ConvNeXtBlock(C, use_grn=True, ls_init_value=None),
        (2, C, 6, 6),
        "conv_dw",
    ),
    "edgenext": (lambda: edgenext.ConvBlock(C), (2, C, 6, 6), "conv_dw"),
}
CHANGES = {
    "weight": lambda b: setattr(b.mlp.fc1, "weight", nn.Parameter(b.mlp.fc1.weight.detach() * 2)),
    "hook": lambda b: b.mlp.fc2.register_forward_hook(lambda m, a, out: out * 2),
    "child": lambda b: setattr(b, "mlp", nn.Identity()),
    "act": lambda b: setattr(b.mlp, "act", nn.Tanh()),
}
CONVOLVED = [name for name, block in BLOCKS.items() if block[2] == "conv_dw"]


@pytest.fixture
def pair(request, lively):
    make, shape, first = BLOCKS[request.param]
    theirs = lively(make()).eval()
    ours, x = copy.deepcopy(theirs), torch.randn(shape)
    swap(ours)
    with torch.no_grad():
        for _ in range(4):
            ours(x)
    return theirs, ours, x, first


def hook(block, first, change):
    once = []

    def run(module, args, out):
        if not once:
            once.append(change(block))

    block.get_submodule(first).register_forward_hook(run)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("pair", BLOCKS, indirect=True)
def test_a_change_counts_at_once(pair, change, grad):
    theirs, ours, x, first = pair
    for block in (theirs, ours):
        hook(block, first, CHANGES[change])
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pair", CONVOLVED, indirect=True)
def test_a_map_that_broadcasts(pair):
    theirs, ours, x, first = pair
    for block in (theirs, ours):
        block.get_submodule(first).register_forward_hook(lambda m, a, out: out[:1])
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pair", list(BLOCKS), indirect=True)
def test_a_tensor_with_rules_of_its_own(pair):
    class Doubles(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            out = super().__torch_function__(func, types, args, kwargs or {})
            return out * 2 if func is nn.functional.linear else out

    theirs, ours, x, first = pair
    for block in (theirs, ours):
        block.get_submodule(first).register_forward_hook(
            lambda m, a, out: out.detach().as_subclass(Doubles)
        )
    with torch.no_grad():
        got, want = ours(x), theirs(x)
    assert type(got) is type(want)
    torch.testing.assert_close(*(t.as_subclass(torch.Tensor) for t in (got, want)))
