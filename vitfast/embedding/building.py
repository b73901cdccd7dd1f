"""The model of an Embedder: made by name, where it lies, what it takes, and how it is pooled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import nn

from vitfast.errors import InputValueError, first_line
from vitfast.loading import (
    check_name,
    create,
    load_backbone,
    no_weights,
    stay_offline_without_network,
)


def source_of(
    pretrained: bool, checkpoint: str | os.PathLike[str] | None, seed: int
) -> dict[str, Any]:
    """Where weights come from, as it is recorded."""
    if pretrained and checkpoint:
        raise InputValueError("pretrained and checkpoint: expected one of them")
    if pretrained:
        return {"from": "pretrained"}
    if checkpoint:
        return {"from": "checkpoint", "checkpoint": str(Path(checkpoint).absolute())}
    return {"from": "random", "seed": seed}


def built(name: str, source: dict[str, Any], kwargs: dict[str, Any]) -> nn.Module:
    """A timm model without its classifier, on the CPU."""
    check_name(name)
    pretrained = source["from"] == "pretrained"
    if pretrained:
        stay_offline_without_network()
    generator = torch.default_generator
    before = generator.get_state()  # the user's own random numbers stay what they are
    generator.manual_seed(source.get("seed", 0))
    try:
        model = create(name, pretrained, {**kwargs, "num_classes": 0})
    except Exception as error:  # the hub's client has a family of errors of its own
        why = no_weights(name, error) if pretrained else f"{name}: {first_line(error)}"
        raise InputValueError(why) from error
    finally:
        generator.set_state(before)
    if source["from"] == "checkpoint":
        load_backbone(model, source["checkpoint"])
    return model


def name_of(model: nn.Module) -> str:
    """timm's name where the model knows it, else its class's."""
    known = getattr(model, "pretrained_cfg", None) or {}
    return known.get("architecture") or type(model).__name__


def device_of(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputValueError(f"device {device!r}: {first_line(error)}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InputValueError(f"device {device}: torch sees no GPU here")
    return found


def data_config(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """timm's preprocessing of this model, for the image size and channels that it was made for."""
    known = resolve_data_config({}, model=model)
    patches = getattr(model, "patch_embed", None)
    channels, *usual = known["input_size"]
    channels = getattr(getattr(patches, "proj", None), "in_channels", None) or channels
    channels = kwargs.get("in_chans") or channels
    size = kwargs.get("img_size") or getattr(patches, "img_size", None) or usual
    height, width = (size, size) if isinstance(size, int) else size
    config = {**known, "input_size": (channels, height, width)}
    if channels == 1:  # as timm turns a first convolution of three channels into one of one
        config.update({key: (sum(known[key]) / 3,) for key in ("mean", "std")})
    return config


def pooled(model: Any, features: torch.Tensor, pool: Any) -> torch.Tensor:
    """[B, D] of the features as `Embedder` describes `pool`."""
    if callable(pool):
        return pool(features)
    prefix = getattr(model, "num_prefix_tokens", 0)
    if pool == "token":
        if features.ndim != 3 or getattr(model, "cls_token", None) is None:
            raise InputValueError(f"pool 'token': {type(model).__name__} has no class token")
        return features[:, 0]
    if features.ndim == 3:
        return features[:, prefix:].mean(1)
    if features.ndim == 4:
        channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        return features.mean((1, 2) if channels_last else (2, 3))
    return features
