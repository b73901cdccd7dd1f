"""Drop-ins for timm's MetaFormer (PoolFormer, ConvFormer, CAFormer): blocks, attention, norms."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm import layers as timm_layers
from timm.models import metaformer
from torch import nn

from vitfast import plans
from vitfast.engine import memo
from vitfast.engine import metaformer as engine
from vitfast.engine.eligibility import plan_call, records
from vitfast.layers import _as_built, _attention, _block, _conv, _convnext, _guard, _mlp, _norm
from vitfast.layers._base import Layer
from vitfast.layers._guard import Children
from vitfast.layers.mlp import plan_pointwise
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
    _guard.check_bare(conv, "conv")
    plain = type(norm) is nn.Identity
    if plain:
        _guard.check_bare(norm, "norm")
    found = _conv.plan_plain(conv)
    return Downsample(None if plain else _norm.child_2d(children, "norm"), found)


def plan_attention(module: Any) -> plans.Attention:
    """How timm's `Attention` of MetaFormer computes."""
    plan = _attention.common(module, (_guard.layer(module._modules, "qkv"),))
    return _attention.check_width(plan)


def plan_block(module: nn.Module) -> plans.MetaFormerBlock:
    """How timm's `MetaFormerBlock` computes, on channels last."""
    children = module._modules
    attends = type(children["token_mixer"]) in _attention.PLANS
    act, star = _activation(children["mlp"]._modules, "act")
    if _mlp.POINTWISE.get(type(children["mlp"])) is not plan_pointwise:
        raise Unsupported(f"MLP {type(children['mlp']).__name__} is not implemented")
    _guard.check_bare(children["mlp"], "mlp")
    drops = [_guard.drop_path(children, f"drop_path{i}") for i in (1, 2)]
    return plans.MetaFormerBlock(
        first=_plan_half(children, "1", attends),
        mixer=_plan_mixer(children),
        second=_plan_half(children, "2", attends),
        mlp=_mlp.common(children["mlp"], "fc1", pointwise=True, act=act),
        star=star,
        drop=drops[0] or drops[1],
    )


def _plan_half(children: Children, number: str, attends: bool) -> plans.MetaFormerHalf:
    name = f"norm{number}"
    norm: plans.Norm | plans.GroupNorm
    if type(children[name]) in _ONE_GROUP and not attends:
        norm = _plan_group_norm(children, name)
    else:
        norm = (_norm.child if attends else _norm.child_2d)(children, name)
    factors = (_plan_scale(children, f"{kind}_scale{number}", attends) for kind in ("layer", "res"))
    return plans.MetaFormerHalf(norm, *factors)


def _plan_group_norm(children: Children, name: str) -> plans.GroupNorm:
    module = children[name]
    _guard.check_bare(module, name)
    if module._fast_norm:
        raise Unsupported("fast norm was switched on when it was built")
    weight, bias = (_guard.tensor(module, n) for n in ("weight", "bias"))
    return plans.GroupNorm(module.num_groups, weight, bias, module.eps, "none")


def _plan_scale(children: Children, name: str, attends: bool) -> torch.Tensor | None:
    module = children[name]
    _guard.check_bare(module, name)
    if type(module) is nn.Identity:
        return None
    if type(module) is not metaformer.Scale:
        raise Unfit(f"{name} is a {type(module).__name__}, not timm's Scale")
    scale = _guard.tensor(module, "scale")
    if scale is None:
        raise Unfit(f"{name} has no scale")
    channels = tuple(scale.shape)
    _as_built.expect(module, shape=channels if attends else (*channels, 1, 1))
    return scale


def _plan_mixer(children: Children) -> plans.SepConv | plans.Pooling | plans.Attention:
    module = children["token_mixer"]
    if type(module) is metaformer.Pooling and type(module.pool) is nn.AvgPool2d:
        return plans.Pooling(module)
    if type(module) is not metaformer.SepConv:
        return _attention.child(children, "token_mixer")
    _guard.check_bare(module, "token_mixer")
    inner = module._modules
    act, star = _activation(inner, "act1")
    if _guard.activation(inner, "act2") != "none":
        raise Unsupported("an activation after the depthwise convolution is not implemented")
    return plans.SepConv(
        fc1=_guard.linear(inner, "pwconv1", pointwise=True),
        act=act,
        star=star,
        conv=_convnext.depthwise(inner, "dwconv"),
        fc2=_guard.linear(inner, "pwconv2", pointwise=True),
    )


def _activation(children: Children, name: str) -> tuple[str, plans.StarReLU | None]:
    """The name of an activation, and what comes after it in a StarReLU."""
    module = children.get(name)
    if type(module) is not metaformer.StarReLU:
        return _guard.activation(children, name), None
    _guard.check_bare(module, name)
    act = _guard.activation(module._modules, "relu")
    if act != "relu":
        raise Unfit(f"the relu of a StarReLU is {act}")
    return act, plans.StarReLU(_guard.tensor(module, "scale"), _guard.tensor(module, "bias"))


class MetaFormerBlock(Layer, metaformer.MetaFormerBlock):
    """`timm.models.metaformer.MetaFormerBlock` in inference on the CPU; channels-last out.

    Elsewhere timm's forward, on swapped norms and attention.
    """

    role = "block"
    plan = staticmethod(plan_block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = None
        if not torch.compiler.is_compiling():
            plan = memo.recall_plan(plan_block, self, x)
            if plan is not None and not records(x, plan):
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

    plan = staticmethod(plan_downsampling)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = plan_call(plan_downsampling, self, x)
        if plan is None or x.ndim != 4 or not x.is_floating_point():
            return super().forward(x)
        if plan.norm is not None:
            rows = _norm.apply(x.permute(0, 2, 3, 1), plan.norm, _block.operand_dtype(x))
            x = rows.permute(0, 3, 1, 2)
        return _conv.apply(x, plan.conv)


class Attention(Layer, metaformer.Attention):
    """`timm.models.metaformer.Attention` on `vitfast.ops.attention`."""

    role = "attention"
    plan = staticmethod(plan_attention)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = plan_call(plan_attention, self, x)
        return super().forward(x) if plan is None else _attention.attend(x, plan)


class LayerNormNoBias(Layer, metaformer.LayerNormNoBias):
    """`timm.models.metaformer.LayerNormNoBias` on `vitfast.ops.layer_norm`."""

    plan = staticmethod(_norm.plan)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = plan_call(_norm.plan, self, x)
        return super().forward(x) if plan is None else _norm.apply(x, plan)


class LayerNorm2dNoBias(Layer, metaformer.LayerNorm2dNoBias):
    """`timm.models.metaformer.LayerNorm2dNoBias` on `vitfast.ops.layer_norm`; channels-last out."""

    plan = staticmethod(_norm.plan_2d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = plan_call(_norm.plan_2d, self, x)
        if plan is None or x.ndim != 4:
            return super().forward(x)
        return _norm.apply(x.permute(0, 2, 3, 1), plan).permute(0, 3, 1, 2)


_attention.PLANS |= {metaformer.Attention: plan_attention, Attention: plan_attention}
_norm.KINDS |= {metaformer.LayerNormNoBias: "layer", LayerNormNoBias: "layer"}
_norm.KINDS_2D |= {metaformer.LayerNorm2dNoBias: "layer", LayerNorm2dNoBias: "layer"}
