"""Dense attention matrices of timm's own unfused forwards, to hold maps against."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

from vitfast.bench.zoo import enliven


def make(name: str, **kwargs) -> nn.Module:
    """A timm model in evaluation mode, whose random weights all have effect and whose attention
    is far from uniform."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    enliven(model)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Else random scores are so small that a wrong scale or bias would hardly show.
            if "qkv.weight" in parameter_name or "_proj.weight" in parameter_name:
                parameter.mul_(4)
            elif "bias_table" in parameter_name or "q_bias" in parameter_name:
                parameter.add_(torch.randn_like(parameter))
            elif "q_norm" in parameter_name or "k_norm" in parameter_name:
                parameter.mul_(2)
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


@pytest.fixture
def image() -> torch.Tensor:
    """Two images that are wider than high."""
    return torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(1))
