"""Tools that count by a table of module types (thop, ptflops, calflops), on swapped models.

They put a forward hook on every module whose exact type is in the table. A drop-in's type is its
own: what the table says of timm's class, or of torch's, is not found.
"""

from __future__ import annotations

from collections import Counter

import pytest
import timm
import torch
from timm import layers as timm_layers
from torch import nn

import vitfast

MODELS = {
    "vit": ("vit_tiny_patch16_224", dict(img_size=32, depth=2, norm_layer=nn.LayerNorm), 32),
    "swin": ("swin_tiny_patch4_window7_224", dict(img_size=64, depths=(2, 2)), 64),
    "convnext": ("convnext_atto", dict(depths=(2, 1, 1, 1)), 64),
}
PER_OUTPUT = {
    nn.Linear: lambda module, args: module.in_features,
    nn.Conv2d: lambda module, args: module.weight[0].numel(),
    nn.LayerNorm: lambda module, args: 2,
    nn.GELU: lambda module, args: 1,
    timm_layers.Attention: lambda module, args: 2 * args[0].shape[1],
}


def count(model: nn.Module, x: torch.Tensor) -> Counter:
    """Operations by type, as those tools count them."""
    found: Counter = Counter()

    def hook(module, args, out):
        found[type(module)] += out.numel() * PER_OUTPUT[type(module)](module, args)

    hooks = [m.register_forward_hook(hook) for m in model.modules() if type(m) in PER_OUTPUT]
    with torch.no_grad():
        model(x)
    for handle in hooks:
        handle.remove()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_counts_are_timms_within_restore(name):
    """As the README has it: restore, count, swap. What is still torch's own counts right anyway."""
    architecture, options, size = MODELS[name]
    model = timm.create_model(architecture, **options).eval()
    x = torch.randn(1, 3, size, size)
    timms = count(model, x)
    replaced = {type(m) for m in model.modules()}
    swapped = vitfast.swap(model)
    replaced -= {type(m) for m in model.modules()}
    with torch.no_grad():
        for _ in range(4):  # warm: a replay has to stop for the hooks
            before = model(x)
    found = count(model, x)
    assert {kind: n for kind, n in timms.items() if kind not in replaced} == found
    if name == "vit":  # why the README says so
        assert replaced & timms.keys() == {nn.LayerNorm, timm_layers.Attention}
    assert count(vitfast.restore(model), x) == timms
    assert vitfast.swap(model) == swapped
    with torch.no_grad():
        torch.testing.assert_close(model(x), before)
