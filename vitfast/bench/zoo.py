"""timm models by name, as commands build them: seeded weights, any image size, clear errors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from vitfast.errors import InputValueError, first_line
from vitfast.loading import check_name, create, no_weights, stay_offline_without_network

_GAINS = ("gamma", "gamma_1", "gamma_2")
UNFIT = (AssertionError, ValueError, TypeError, RuntimeError, NotImplementedError)
"""What timm and torch raise for a size that a model cannot take."""


def parse_img_size(text: str) -> tuple[int, int]:
    """(height, width) out of "224" or "2160x3840".

    Raises:
        InputValueError: anything else.
    """
    found = re.fullmatch(r"([1-9]\d{0,5})(?:x([1-9]\d{0,5}))?", text.strip().lower())
    if found is None:
        raise InputValueError(f"--img-size {text}: expected a size such as 224 or 2160x3840")
    height = int(found[1])
    return height, int(found[2] or height)


def build(
    name: str,
    img_size: tuple[int, int] | None = None,
    *,
    device: str = "cpu",
    seed: int = 0,
    pretrained: bool = False,
    **timm_kwargs: Any,
) -> nn.Module:
    """A timm model in eval mode; weights are random and seeded unless `pretrained`.

    It drops nothing at random in training either: what is judged has to be the same every time.

    Raises:
        InputValueError: no such model, a size that it cannot be built for, or weights that cannot
            be fetched.
    """
    check_name(name)
    if pretrained:
        stay_offline_without_network()
    kwargs = dict(timm_kwargs)
    if img_size is not None:
        kwargs["img_size"] = img_size
    torch.manual_seed(seed)
    with torch.device(device):
        try:
            model = create(name, pretrained, kwargs)
        except UNFIT as error:
            if pretrained:
                raise InputValueError(no_weights(name, error)) from error
            raise InputValueError(f"{name} {_sized(img_size)}: {first_line(error)}") from error
        except Exception as error:  # the hub's client has a family of errors of its own
            raise InputValueError(no_weights(name, error)) from error
    if not pretrained and device != "meta":
        enliven(model, seed)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def _sized(img_size: tuple[int, int] | None) -> str:
    return "at its own size" if img_size is None else f"at {img_size[0]}x{img_size[1]}"


@torch.no_grad()
def enliven(model: nn.Module, seed: int = 0) -> None:
    """Give random weights effect, in place, as a trained model's have.

    timm starts LayerScale at 1e-5, relative position tables and biases at 0 and norm weights at 1.
    With those a block hardly changes its input, and a wrong kernel would hardly show.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0 or not bool((parameter == parameter.flatten()[0]).all()):
            continue
        if name.rsplit(".", 1)[-1] in _GAINS:
            values = 0.2 + 0.8 * torch.rand(parameter.shape, generator=generator)
            parameter.copy_(values)
        else:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.02 * noise.to(parameter.device))


def image_shape(model: nn.Module, img_size: tuple[int, int] | None) -> tuple[int, int, int]:
    """(channels, height, width) of one image, of this size or else the model's own."""
    channels, height, width = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    return (channels, *(img_size or (height, width)))


def flops(module: nn.Module, name: str, inputs: Sequence[torch.Tensor]) -> float:
    """Floating point operations of a forward's matrix products and convolutions.

    They are counted on the meta device, where nothing is computed.

    Raises:
        InputValueError: the module cannot take these inputs.
    """
    with FlopCounterMode(display=False) as counter:
        try:
            run_on_meta(module, inputs)
        except UNFIT as error:
            shape = "x".join(str(n) for n in inputs[0].shape)
            raise InputValueError(f"{name} on {shape}: {first_line(error)}") from error
    return float(counter.get_total_flops())


@torch.no_grad()
def run_on_meta(module: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    """One forward on the meta device, where shapes are worked out and nothing is computed; hooks
    and modes see it. The module stays where it is.

    Raises:
        one of UNFIT: the module cannot take these inputs.
    """
    state: dict[str, torch.Tensor] = {
        name: t.detach().to("meta")
        for name, t in (*module.named_parameters(), *module.named_buffers())
    }
    functional_call(module, state, tuple(x.to("meta") for x in inputs))


def checked_forward(model: nn.Module, name: str, image: torch.Tensor) -> torch.Tensor:
    """One forward of a model.

    Raises:
        InputValueError: the model cannot take an image of this size.
    """
    try:
        return model(image)
    except UNFIT as error:
        height, width = image.shape[-2:]
        raise InputValueError(f"{name} {_sized((height, width))}: {first_line(error)}") from error
