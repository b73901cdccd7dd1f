"""Dense attention matrices of timm's own unfused forwards, to hold maps against."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from vitfast.bench.zoo import enliven

SMALL = dict(embed_dim=96, num_heads=3)


def make(name: str, img_size=(48, 64), depth: int | None = 2, **kwargs) -> nn.Module:
    """A timm model in evaluation mode, whose random weights all have effect and whose attention
    is far from uniform."""
    torch.manual_seed(0)
    if depth is not None:
        kwargs["depth"] = depth
    model = timm.create_model(name, img_size=img_size, **kwargs).eval()
    enliven(model)
    with torch.no_grad():
        for where, parameter in model.named_parameters():
            # Else scores are so small that a wrong scale or bias would hardly show.
            if any(part in where for part in ("qkv.weight", "q_proj.w", "k_proj.w", "kv.weight")):
                parameter.mul_(3)
            elif any(part in where for part in ("bias_table", "q_bias", "qkv.bias", "q_proj.b")):
                parameter.add_(torch.randn_like(parameter))
            elif where.endswith("_token"):  # which else are as good as equal
                parameter.normal_()
            elif "q_norm" in where or "k_norm" in where:
                parameter.mul_(0.5 + torch.rand_like(parameter))
    return model


def dense(
    model: nn.Module, image: torch.Tensor, keep: Callable = lambda a: a
) -> list[torch.Tensor]:
    """keep(attention) of every layer, as timm's unfused forward of a copy computes it."""
    model = copy.deepcopy(model).eval()
    found: list[torch.Tensor] = []
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if isinstance(getattr(module, "attn_drop", None), nn.Dropout):
            module.attn_drop.register_forward_hook(lambda m, args, out: found.append(keep(out)))
    with torch.no_grad():
        model(image)
    return found


def joined(found) -> torch.Tensor:
    """A map as [B, heads, Q, N], tokens in the model's order."""
    return torch.cat([found.prefix, found.patches.flatten(-2)], -1)


def noise(batch: int = 2, size=(48, 64)) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def zoo() -> SimpleNamespace:
    return SimpleNamespace(make=make, dense=dense, joined=joined, noise=noise, SMALL=SMALL)
