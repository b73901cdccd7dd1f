"""How the layers read a convolution's weights."""

from __future__ import annotations

from typing import Any

from timm import layers as timm_layers
from torch import nn

from vitfast import plans
from vitfast.layers.reading.as_built import expect_attributes
from vitfast.layers.reading.children import Children, check_bare, read_parameter, timm_class
from vitfast.plans import Conv, Unfit, Unsupported

_STD_CONVS = {timm_layers.StdConv2d, timm_layers.StdConv2dSame}


def plan_std_conv(module: Any) -> Conv:
    """What a convolution holds, its own hooks set aside (whoever called it has run them)."""
    if timm_class(module) not in _STD_CONVS:
        raise Unsupported(f"convolution {type(module).__name__} is not implemented")
    weight = module.weight
    expect_attributes(module, out_channels=weight.shape[0], kernel_size=tuple(weight.shape[2:]))
    return _hold(module, module.eps, getattr(module, "same_pad", False))


def plan_conv(module: Any) -> Conv:
    """As `plan_std_conv`, of a module that must be exactly an nn.Conv2d."""
    if type(module) is not nn.Conv2d:
        raise Unfit(f"a convolution is a {type(module).__name__}, not torch.nn.Conv2d")
    if module.padding_mode != "zeros":
        raise Unsupported(f"padding with {module.padding_mode} is not implemented")
    return _hold(module, None, False)


def _hold(module: Any, eps: float | None, same: bool) -> Conv:
    if isinstance(module.padding, str):
        raise Unsupported(f"padding by name ({module.padding!r}) is not implemented")
    return Conv(
        read_parameter(module, "weight"),
        read_parameter(module, "bias"),
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        eps,
        same,
    )


def read_std_conv(children: Children, name: str) -> Conv:
    """What a child holds that must be a weight-standardised convolution."""
    module = children[name]
    check_bare(module, name)
    return plan_std_conv(module)


def plan_projection(module: nn.Module, name: str = "proj") -> plans.Projection:
    """What a child holds that must be a convolution of disjoint patches."""
    proj = module._modules[name]
    if type(proj) is not nn.Conv2d:
        raise Unfit(f"{name} is a {type(proj).__name__}, not torch.nn.Conv2d")
    check_bare(proj, name)
    plain = proj.padding == (0, 0) and proj.dilation == (1, 1) and proj.groups == 1
    if not plain or proj.stride != proj.kernel_size:
        raise Unsupported("its convolution is not one of disjoint patches")
    return plans.Projection(read_parameter(proj, "weight"), read_parameter(proj, "bias"))
