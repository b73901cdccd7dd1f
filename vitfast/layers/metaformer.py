"""Drop-ins for timm's MetaFormer (PoolFormer, ConvFormer, CAFormer): blocks, attention, norms."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm import layers as timm_layers
from timm.models import metaformer
from torch import nn

from vitfast import plans
from vitfast.blocks.parts import apply_conv, apply_norm, attend, operand_dtype
from vitfast.engine import metaformer as engine
from vitfast.engine.eligibility import takes_engine
from vitfast.layers.base import ATTENTION, BLOCK, NORM, Layer
from vitfast.layers.mlp import plan_pointwise
from vitfast.layers.reading.as_built import expect_attributes
from vitfast.layers.reading.attention import (
    ATTENTION_PLANS,
    check_attention_width,
    plan_common_attention,
    read_attention,
)
from vitfast.layers.reading.block import read_depthwise
from vitfast.layers.reading.children import (
    Children,
    check_bare,
    read_activation,
    read_drop_path,
    read_linear,
    read_or_call_linear,
    read_parameter,
    timm_class,
)
from vitfast.layers.reading.conv import plan_conv
from vitfast.layers.reading.mlp import POINTWISE_MLP_PLANS, plan_common_mlp
from vitfast.layers.reading.norm import (
    plan_norm,
    plan_norm_2d,
    read_norm,
    read_norm_2d,
)
from vitfast.plans import Unfit, Unsupported

_ONE_GROUP = {timm_layers.GroupNorm1, metaformer.GroupNorm1NoBias}


class Downsample(NamedTuple):
    """A norm over channels, or none, and a convolution."""

    norm: plans.Norm | None
    conv: plans.Conv


def plan_downsampling(module: nn.Module) -> Downsample:
    """How timm's `Downsampling` of MetaFormer computes."""
    children = module._modules
    conv, norm = children["conv"], children["norm"]
    check_bare(conv, "conv")
    plain = type(norm) is nn.Identity
    if plain:
        check_bare(norm, "norm")
    found = plan_conv(conv)
    return Downsample(None if plain else read_norm_2d(children, "norm"), found)


def plan_attention(module: Any) -> plans.Attention:
    """How timm's `Attention` of MetaFormer computes."""
    plan = plan_common_attention(module, (read_or_call_linear(module._modules, "qkv"),))
    return check_attention_width(plan)


def plan_block(module: nn.Module) -> plans.MetaFormerBlock:
    """How timm's `MetaFormerBlock` computes, on channels last."""
    children = module._modules
    attends = timm_class(children["token_mixer"]) in ATTENTION_PLANS
    act, star = _activation(children["mlp"]._modules, "act")
    if POINTWISE_MLP_PLANS.get(timm_class(children["mlp"])) is not plan_pointwise:
        raise Unsupported(f"MLP {type(children['mlp']).__name__} is not implemented")
    check_bare(children["mlp"], "mlp")
    drops = [read_drop_path(children, f"drop_path{i}") for i in (1, 2)]
    return plans.MetaFormerBlock(
        first=_plan_half(children, "1", attends),
        mixer=_plan_mixer(children),
        second=_plan_half(children, "2", attends),
        mlp=plan_common_mlp(children["mlp"], "fc1", pointwise=True, act=act),
        star=star,
        drop=drops[0] or drops[1],
    )


def _plan_half(children: Children, number: str, attends: bool) -> plans.MetaFormerHalf:
    name = f"norm{number}"
    norm: plans.Norm | plans.GroupNorm
    if type(children[name]) in _ONE_GROUP and not attends:
        norm = _plan_group_norm(children, name)
    else:
        norm = (read_norm if attends else read_norm_2d)(children, name)
    factors = (_plan_scale(children, f"{kind}_scale{number}", attends) for kind in ("layer", "res"))
    return plans.MetaFormerHalf(norm, *factors)


def _plan_group_norm(children: Children, name: str) -> plans.GroupNorm:
    module = children[name]
    check_bare(module, name)
    if module._fast_norm:
        raise Unsupported("fast norm was switched on when it was built")
    weight, bias = (read_parameter(module, n) for n in ("weight", "bias"))
    return plans.GroupNorm(module.num_groups, weight, bias, module.eps, "none")


def _plan_scale(children: Children, name: str, attends: bool) -> torch.Tensor | None:
    module = children[name]
    check_bare(module, name)
    if type(module) is nn.Identity:
        return None
    if type(module) is not metaformer.Scale:
        raise Unfit(f"{name} is a {type(module).__name__}, not timm's Scale")
    scale = read_parameter(module, "scale")
    if scale is None:
        raise Unfit(f"{name} has no scale")
    channels = tuple(scale.shape)
    expect_attributes(module, shape=channels if attends else (*channels, 1, 1))
    return scale


def _plan_mixer(children: Children) -> plans.SepConv | plans.Pooling | plans.Attention:
    module = children["token_mixer"]
    if type(module) is metaformer.Pooling and type(module.pool) is nn.AvgPool2d:
        return plans.Pooling(module)
    if type(module) is not metaformer.SepConv:
        return read_attention(children, "token_mixer")
    check_bare(module, "token_mixer")
    inner = module._modules
    act, star = _activation(inner, "act1")
    if read_activation(inner, "act2") != "none":
        raise Unsupported("an activation after the depthwise convolution is not implemented")
    return plans.SepConv(
        fc1=read_linear(inner, "pwconv1", pointwise=True),
        act=act,
        star=star,
        conv=read_depthwise(inner, "dwconv"),
        fc2=read_linear(inner, "pwconv2", pointwise=True),
    )


def _activation(children: Children, name: str) -> tuple[str, plans.StarReLU | None]:
    """The name of an activation, and what comes after it in a StarReLU."""
    module = children.get(name)
    if type(module) is not metaformer.StarReLU:
        return read_activation(children, name), None
    check_bare(module, name)
    act = read_activation(module._modules, "relu")
    if act != "relu":
        raise Unfit(f"the relu of a StarReLU is {act}")
    return act, plans.StarReLU(read_parameter(module, "scale"), read_parameter(module, "bias"))


class MetaFormerBlock(Layer, metaformer.MetaFormerBlock):
    """`timm.models.metaformer.MetaFormerBlock` in inference on the CPU; channels-last out.

    Elsewhere timm's forward, on swapped norms and attention.
    """

    role = "block"
    ops = BLOCK
    plan = staticmethod(plan_block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = None
        if not torch.compiler.is_compiling():
            plan = self._recall_plan(x)
            if plan is not None and takes_engine(x, plan):
                out = _run(x, plan)
        return super().forward(x) if out is None else out


def _run(x: torch.Tensor, plan: plans.MetaFormerBlock) -> torch.Tensor | None:
    if isinstance(plan.mixer, plans.Attention):
        return engine.run(x, plan) if x.ndim == 3 else None
    if x.ndim != 4:
        return None
    out = engine.run(x.permute(0, 2, 3, 1), plan)
    return None if out is None else out.permute(0, 3, 1, 2)


class Downsampling(Layer, metaformer.Downsampling):
    """`timm.models.metaformer.Downsampling`, packing its weight once a version in inference."""

    ops = NORM
    plan = staticmethod(plan_downsampling)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._plan_call(x)
        if plan is None or x.ndim != 4 or not x.is_floating_point():
            return super().forward(x)
        if plan.norm is not None:
            rows = apply_norm(x.permute(0, 2, 3, 1), plan.norm, operand_dtype(x))
            x = rows.permute(0, 3, 1, 2)
        return apply_conv(x, plan.conv)


class Attention(Layer, metaformer.Attention):
    """`timm.models.metaformer.Attention` on `vitfast.ops.attention`."""

    role = "attention"
    ops = ATTENTION
    plan = staticmethod(plan_attention)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._plan_call(x)
        return super().forward(x) if plan is None else attend(x, plan)


class LayerNormNoBias(Layer, metaformer.LayerNormNoBias):
    """`timm.models.metaformer.LayerNormNoBias` on `vitfast.ops.layer_norm`."""

    ops = ("layer_norm",)
    plan = staticmethod(plan_norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._plan_call(x)
        return super().forward(x) if plan is None else apply_norm(x, plan)


class LayerNorm2dNoBias(Layer, metaformer.LayerNorm2dNoBias):
    """`timm.models.metaformer.LayerNorm2dNoBias` on `vitfast.ops.layer_norm`; channels-last out."""

    ops = ("layer_norm",)
    plan = staticmethod(plan_norm_2d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._plan_call(x)
        if plan is None or x.ndim != 4:
            return super().forward(x)
        return apply_norm(x.permute(0, 2, 3, 1), plan).permute(0, 3, 1, 2)


ATTENTION_PLANS[metaformer.Attention] = plan_attention
