"""Pictures as inputs of models: resized, normalised."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from vitfast.errors import InputTypeError, InputValueError
from vitfast.pictures import decode, read_image


def as_images(model: nn.Module, image: Any) -> torch.Tensor:
    """What a model is given for an image: [B, 3, H, W] on its device and in its dtype.

    Args:
        image: a tensor of floats [3, H, W] or [B, 3, H, W], which is normalised already; or a
            picture as `picture_input` takes it, which is brought to the model's own size.

    Raises:
        InputTypeError, InputValueError: nothing of that kind.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"expected a model, got {type(model).__name__}")
    if not isinstance(image, torch.Tensor) or image.dtype == torch.uint8:
        return picture_input(model, image, input_size(model))
    if not image.is_floating_point():
        raise InputTypeError(f"image: expected floats or uint8, got {image.dtype}")
    if image.ndim not in (3, 4) or image.numel() == 0:
        raise InputValueError(
            f"image: expected [3, H, W] or [B, 3, H, W], got shape {tuple(image.shape)}"
        )
    return _like_weights(model, image if image.ndim == 4 else image[None])


def picture_input(model: nn.Module, picture: Any, size: tuple[int, int] | None) -> torch.Tensor:
    """A picture as a model's input [1, 3, H, W], normalised by the model's pretrained_cfg.

    Args:
        picture: uint8 [3, H, W] as tensor, or what `vitfast.pictures.decode` takes: a path, a PIL
            image, an array [H, W, 3].
        size: (H, W) to which all of it is resized; None: as it is.

    Raises:
        InputTypeError, InputValueError: nothing of that kind.
    """
    config = _config(model)
    pixels = _rgb(picture)
    if size is not None:
        pixels = pixels.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255
    mean = values.new_tensor(config.get("mean", IMAGENET_DEFAULT_MEAN)).view(-1, 1, 1)
    std = values.new_tensor(config.get("std", IMAGENET_DEFAULT_STD)).view(-1, 1, 1)
    return _like_weights(model, ((values - mean) / std)[None])


def input_size(model: nn.Module) -> tuple[int, int]:
    """(H, W) of the images that a model was built for."""
    for module in model.modules():
        size = getattr(getattr(module, "patch_embed", None), "img_size", None)
        if isinstance(size, (tuple, list)) and len(size) == 2:
            return int(size[0]), int(size[1])
    _, height, width = _config(model).get("input_size", (3, 224, 224))
    return height, width


def _config(model: nn.Module) -> dict[str, Any]:
    for module in model.modules():
        config = getattr(module, "pretrained_cfg", None)
        if isinstance(config, dict):
            return config
    return {}


def _rgb(picture: Any) -> Image.Image:
    if isinstance(picture, (str, os.PathLike)):
        return read_image(picture)
    if isinstance(picture, torch.Tensor):
        if picture.ndim != 3:
            raise InputValueError(
                f"image: expected uint8 pixels [3, H, W], got shape {tuple(picture.shape)}"
            )
        picture = picture.movedim(0, -1).cpu().numpy()
    try:
        return decode(picture)
    except (InputTypeError, InputValueError) as error:
        raise type(error)(f"image: {error}") from error.__cause__


def _like_weights(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return image.to(parameter.device, parameter.dtype)
    return image
