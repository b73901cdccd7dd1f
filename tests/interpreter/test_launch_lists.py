"""Models whose blocks issue recorded lists give what they give by the ops, bit for bit."""

from __future__ import annotations

import ctypes

import pytest
import timm
import torch

import vitfast
from vitfast.runtime import kernel_calls, launch_lists
from vitfast.runtime.kernel_calls import Launched, Prepared
from vitfast.settings import settings
from vitfast.testing.errors import same_bits

VIT = {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 16}
SWIN = {"depths": (2, 1), "embed_dim": 32, "num_heads": (1, 2)}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (16, 24, 16, 16)}
MODELS = {
    "vit_tiny_patch16_224": {**VIT, "init_values": 0.1, "qk_norm": True},
    "vit_small_patch16_dinov3": VIT,
    "swin_tiny_patch4_window7_224": {**SWIN, "img_size": 24, "window_size": 3},
    "swinv2_tiny_window8_256": {**SWIN, "img_size": 32, "window_size": 4},
    "convnext_atto": CONVNEXT,
    "convnextv2_atto": CONVNEXT,
}  # fmt: skip


def made(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **MODELS[name]).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.1, 0.3)
    vitfast.swap(model)
    return model


def lists_of(model):
    kinds = (
        kind
        for module in model.modules()
        for entry in module.__dict__.get("_vitfast_memos", {}).values()
        if entry.kept is not None
        for kind in entry.kept[1].lists.values()
    )
    return [kind.list for kind in kinds]


def size_of(name):
    size = MODELS[name].get("img_size", 32)
    return (1, 3, size, size)


@pytest.fixture(autouse=True)
def by_triton():
    settings.backend = "triton"
    torch.use_deterministic_algorithms(True)  # memory that nobody writes is NaN
    yield
    torch.use_deterministic_algorithms(False)


class Addressed:
    """A launcher that takes addresses, as on a GPU, and calls the interpreter."""

    def __init__(self, kernel, programs, args, options):
        self.kernel, self.programs, self.options = kernel, programs, options
        self.kinds = [
            (a.dtype, self.reach(a)) if isinstance(a, torch.Tensor) else None for a in args
        ]

    @staticmethod
    def reach(t):
        """Bytes from a tensor's first element to the end of its storage."""
        return t.untyped_storage().nbytes() - t.storage_offset() * t.itemsize

    def __call__(self, x, y, z, stream, function, metadata, told, enter, leave, *args):
        assert (x, y, z, stream) == (self.programs, 1, 1, 0)
        tensors = [
            a if kind is None else self.tensor(a, *kind)
            for a, kind in zip(args, self.kinds, strict=True)
        ]
        self.kernel[(x,)](*tensors, **self.options)

    @staticmethod
    def tensor(address, dtype, nbytes):
        assert type(address) is int and address % dtype.itemsize == 0
        held = (ctypes.c_char * nbytes).from_address(address)
        return torch.frombuffer(held, dtype=torch.uint8).view(dtype)


def addressed(kernel, programs, args, options, prepared):
    launcher = Addressed(kernel, programs, args, options)
    return Launched(kernel, programs, args, options, Prepared(None, launcher, None, None, ()))


@pytest.fixture
def by_address(monkeypatch):
    assert launch_lists.Launched is Launched  # whatever stands in kernel_calls meanwhile
    monkeypatch.setattr(kernel_calls, "Launched", addressed)


def check(name):
    model = made(name)
    first, second = (torch.randn(size_of(name)) for _ in range(2))
    with torch.no_grad():
        expected = model(second)
        for _ in range(2):
            model(first)
        found = lists_of(model)
        assert found and None not in found
        assert same_bits(model(second), expected)


@pytest.mark.parametrize("name", MODELS)
def test_lists_with_addresses_give_what_the_ops_give(name, by_address):
    check(name)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnextv2_atto"])
def test_lists_with_tensors_give_what_the_ops_give(name):
    """As for AMD's GPUs."""
    check(name)
