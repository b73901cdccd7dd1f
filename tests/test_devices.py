"""What the package allocates lies where its inputs do, whatever the default device is."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
import timm
import torch

import vitfast
from vitfast.engine.products.weights import clear_weight_cache
from vitfast.swap import swap

PACKAGE = Path(vitfast.__file__).parent
ROOMS = ("ops", "engine", "blocks", "layers", "families", "embedding", "highres", "runtime")
FILES = [f for room in ROOMS for f in sorted((PACKAGE / room).rglob("*.py"))]
FILES += sorted(PACKAGE.glob("*.py"))
FACTORIES = {
    "arange",
    "as_tensor",
    "asarray",
    "bartlett_window",
    "blackman_window",
    "empty",
    "empty_permuted",
    "empty_quantized",
    "empty_strided",
    "eye",
    "from_file",
    "full",
    "hamming_window",
    "hann_window",
    "kaiser_window",
    "linspace",
    "logspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "range",
    "scalar_tensor",
    "sparse_coo_tensor",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
}


def homeless(source: str) -> list[str]:
    """Calls of torch's factories that leave the device to the default."""
    return [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in FACTORIES
        and not any(k.arg in ("device", None) for k in node.keywords)
    ]


@pytest.mark.parametrize("file", FILES, ids=[str(f.relative_to(PACKAGE)) for f in FILES])
def test_every_allocation_names_a_device(file):
    assert homeless(file.read_text()) == []


@pytest.mark.parametrize(
    "source, found",
    [
        ("torch.empty(3)", 1),
        ("f(torch.zeros(2, dtype=d), torch.arange(3))", 2),
        ('torch.empty(3, device="cpu")', 0),
        ("torch.empty(3, **options)", 0),
        ("torch.empty_like(x); x.new_empty(3); native.empty((3,), d)", 0),
    ],
)
def test_the_rule(source, found):
    assert len(homeless(source)) == found


MODELS = {
    "vit_tiny_patch16_224": dict(depth=2, embed_dim=48, num_heads=3, img_size=32),
    "swin_tiny_patch4_window7_224": dict(depths=(2, 2), embed_dim=24, num_heads=(2, 4)),
    "convnext_tiny": dict(depths=(2, 2, 1, 1), dims=(16, 24, 32, 40)),
    "convnextv2_tiny": dict(depths=(2, 2, 1, 1), dims=(16, 24, 32, 40)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@torch.no_grad()
def test_a_default_device_changes_nothing(name, warm):
    torch.manual_seed(0)
    model = swap_in(name)
    size = MODELS[name].get("img_size", 224)
    x = torch.randn(2, 3, size, size)
    want = copy.deepcopy(model)(x)
    clear_weight_cache()
    for _ in range(3 * warm):
        model(x)
    for _ in range(3):
        with torch.device("meta"):
            got = model(x)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_nor_does_it_change_gradients(name):
    torch.manual_seed(0)
    model = swap_in(name)
    size = MODELS[name].get("img_size", 224)
    x = torch.randn(1, 3, size, size)
    want = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    with torch.device("meta"):
        loss = model(x).sum()
        got = torch.autograd.grad(loss, list(model.parameters()), torch.ones((), device="cpu"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def swap_in(name: str) -> torch.nn.Module:
    model = timm.create_model(name, num_classes=7, **MODELS[name]).eval()
    swap(model)
    return model
