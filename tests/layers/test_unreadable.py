"""Tensors whose elements are not what lies at their address: timm's result, or timm's error."""

from __future__ import annotations

import copy

import pytest
import timm
import timm.layers as tl
import torch
from timm.models import convnext, eva, swin_transformer
from timm.models.vision_transformer import Block
from torch import nn

from vitfast.runtime.native import is_readable
from vitfast.swap import swap

C = 24


def inference(t):
    with torch.inference_mode():
        return t.clone()


SAME = {
    "negative": lambda t: torch._neg_view(-t),
    "imaginary_part_of_a_conjugate": lambda t: torch.complex(t, -t).conj().imag,
    "zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "inference": inference,
}
OTHER = {
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "sparse": lambda t: t.to_sparse(),
    "onednn": lambda t: t.to_mkldnn(),
    "lazy_conjugate": lambda t: torch.complex(t, t).conj(),
}
KINDS = SAME | OTHER
VIT = lambda: timm.create_model(  # noqa: E731
    "vit_tiny_patch16_224", img_size=32, embed_dim=C, depth=2, num_heads=3
)
SWIN = lambda: timm.create_model(  # noqa: E731
    "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=C, depths=(2, 1),
    num_heads=(2, 4),
)  # fmt: skip
MODULES = {
    "block": (lambda: Block(C, 3), {"x": (2, 5, C), "attn_mask": (5, 5)}),
    "eva": (lambda: eva.EvaBlock(C, 3), {"x": (2, 5, C), "rope": (4, 16)}),
    "attention": (lambda: tl.Attention(C, 3), {"x": (2, 5, C), "attn_mask": (5, 5)}),
    "mlp": (lambda: tl.Mlp(C), {"x": (2, 5, C)}),
    "layer_norm": (lambda: tl.LayerNorm(C), {"x": (2, 5, C)}),
    "swin": (lambda: swin_transformer.SwinTransformerBlock(C, (8, 8), 3), {"x": (2, 8, 8, C)}),
    "convnext": (lambda: convnext.ConvNeXtBlock(C, ls_init_value=0.5), {"x": (2, C, 8, 8)}),
    "vit_model": (VIT, {"x": (2, 3, 32, 32)}),
    "swin_model": (SWIN, {"x": (2, 3, 32, 32)}),
    "convnext_model": (
        lambda: timm.create_model("convnext_atto", depths=(1,) * 4, dims=(8, 16, 24, 32)),
        {"x": (2, 3, 32, 32)},
    ),
}
ARGUMENTS = [(name, which) for name, (_, shapes) in MODULES.items() for which in shapes]


@pytest.fixture
def pair(request, lively):
    torch.manual_seed(0)
    make, shapes = MODULES[request.param]
    theirs = lively(make()).eval()
    ours = copy.deepcopy(theirs)
    swap(ours)
    arguments = {name: torch.randn(shape) for name, shape in shapes.items()}
    with torch.no_grad():
        for _ in range(3):
            ours(**arguments)
    return theirs, ours, arguments


def outcome(model, arguments):
    """What a call gives, or None where it raises."""
    with torch.no_grad():
        try:
            return model(**arguments)
        except (RuntimeError, NotImplementedError, TypeError):
            return None


def plain(t):
    if t.is_nested:
        return torch.stack(t.unbind())
    return t if t.layout is torch.strided else t.to_dense()


def check_same(theirs, ours, arguments):
    want = outcome(theirs, arguments)
    for _ in range(3):
        got = outcome(ours, arguments)
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(plain(got), plain(want), rtol=1e-4, atol=2e-4)
    return want


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("pair", "which"), ARGUMENTS, indirect=["pair"])
def test_inputs(pair, which, kind):
    theirs, ours, arguments = pair
    arguments[which] = KINDS[kind](arguments[which])
    want = check_same(theirs, ours, arguments)
    assert want is not None or kind in OTHER


def owned(model):
    """Module, dictionary and name of all floating parameters and buffers."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, t in held.items():
                if t is not None and t.is_floating_point():
                    yield module, held, name


@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("pair", MODULES, indirect=True)
def test_every_parameter_and_buffer(pair, kind):
    theirs, ours, arguments = pair
    for (_, held, name), (_, twin, _) in zip(list(owned(theirs)), list(owned(ours)), strict=True):
        before = held[name], twin[name]
        changed = SAME[kind](held[name].detach())
        if isinstance(held[name], nn.Parameter):
            changed = nn.Parameter(changed, requires_grad=False)
        held[name] = twin[name] = changed
        assert check_same(theirs, ours, arguments) is not None
        held[name], twin[name] = before


@pytest.mark.parametrize("kind", [k for k in SAME if k != "inference"])
@pytest.mark.parametrize("pair", MODULES, indirect=True)
def test_data_of_every_tensor(pair, kind):
    """Assigned to a module that has run: the parameter stays the object that it was."""
    theirs, ours, arguments = pair
    for (_, held, name), (_, twin, _) in zip(list(owned(theirs)), list(owned(ours)), strict=True):
        before = held[name].data, twin[name].data
        for of, t in ((held, before[0]), (twin, before[1])):
            # Of the same memory, where the kind allows: only the bit tells.
            of[name].data = torch._neg_view(t) if kind == "negative" else SAME[kind](t)
        assert check_same(theirs, ours, arguments) is not None
        with torch.enable_grad():
            want, got = theirs(**arguments), ours(**arguments)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)
        held[name].data, twin[name].data = before
        assert check_same(theirs, ours, arguments) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_readable(kind):
    t = torch.randn(2, 3)
    assert is_readable(t) and is_readable(t.t()) and is_readable(t[:0])
    assert is_readable(KINDS[kind](t)) == (kind == "inference")
