"""How the attention layers read their weights.

timm's attention modules differ in how they hold the qkv weights and in what they add to the scores;
each has a plan function that fills an `Attention`, and `blocks.parts.attend` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vitfast.layers.reading.as_built import expect_attributes
from vitfast.layers.reading.children import (
    Children,
    check_bare,
    check_no_dropout,
    check_read,
    read_linear,
    read_optional_parameter,
    read_or_call_linear,
    read_parameter,
    timm_class,
)
from vitfast.layers.reading.norm import read_optional_norm
from vitfast.plans import (
    Attention,
    Called,
    Computed,
    Linear,
    Unfit,
    Unsupported,
)

ATTENTION_PLANS: dict[type[nn.Module], Callable[[nn.Module], Attention]] = {}
"""The plan function of each attention of timm."""


def read_attention(children: Children, name: str) -> Attention:
    """What a child holds that must be a known attention module, all of whose weights are read."""
    module = children[name]
    plan = ATTENTION_PLANS.get(timm_class(module))
    if plan is None:
        raise Unsupported(f"attention {type(module).__name__} is not implemented")
    check_bare(module, name)
    found = plan(module)
    check_read(*found.qkv, found.proj)
    return found


def plan_common_attention(module: Any, qkv: tuple[Linear | Called, ...]) -> Attention:
    """The parts that all attention modules have alike."""
    children = module._modules
    if children.get("gate") is not None:
        raise Unsupported("gated attention is not implemented")
    if not module.fused_attn:
        raise Unfit("fused_attn is off")
    check_no_dropout(children, "attn_drop", module.training)
    check_no_dropout(children, "proj_drop")
    q_norm, k_norm = (read_optional_norm(children, n) for n in ("q_norm", "k_norm"))
    if (q_norm and (q_norm.kind, q_norm.eps)) != (k_norm and (k_norm.kind, k_norm.eps)):
        raise Unsupported("q_norm and k_norm differ in kind or eps")
    norm, dim = read_optional_norm(children, "norm"), head_dim(module, module.num_heads, qkv)
    expect_attributes(module, head_dim=dim, attn_dim=dim * module.num_heads)
    for found, width in ((q_norm, dim), (k_norm, dim), (norm, dim * module.num_heads)):
        if found is not None:
            found.check_width(width)
    return Attention(
        heads=module.num_heads,
        qkv=qkv,
        proj=read_or_call_linear(children, "proj"),
        q_norm=q_norm,
        k_norm=k_norm,
        norm=norm,
    )


def head_dim(module: Any, heads: int, qkv: tuple[Linear | Called, ...]) -> int:
    """Channels of a head, by the weights of q alone or of q, k and v together.

    By the module's own word where these are called.
    """
    if isinstance(qkv[0], Called):
        if not hasattr(module, "head_dim"):  # BEiT's
            raise Unfit(qkv[0].why)
        return module.head_dim  # type: ignore[no-any-return]
    rows = qkv[0].weight.shape[0] // (3 if len(qkv) == 1 else 1)
    if heads < 1 or rows % heads:
        raise Unfit(f"{type(module).__name__} has {heads} heads for {rows} channels")
    return rows // heads


def projections(module: Any, heads: int, fused: bool) -> tuple[Linear, Linear]:
    """qkv and proj of an attention with a packed qkv, whose other parts are as timm built them.

    Args:
        heads: of the module, which timm's classes keep under different names.
        fused: whether timm's forward runs SDPA; else it reads the module's scale and softmax.
    """
    children = module._modules
    qkv, proj = read_linear(children, "qkv"), read_linear(children, "proj")
    dim = head_dim(module, heads, (qkv,))
    expect_attributes(module, head_dim=dim, dim_head=dim)
    if not fused:
        expect_attributes(module, scale=dim**-0.5)
        check_softmax(children)
    return qkv, proj


def check_softmax(children: Children) -> None:
    """That the `softmax` of an attention, if it is a child, is one over the keys."""
    module = children.get("softmax")
    if module is not None:
        if type(module) is not nn.Softmax or module.dim != -1:
            raise Unfit(f"softmax is {module}, not over the last dimension")
        check_bare(module, "softmax")


def check_attention_width(plan: Attention) -> Attention:
    """For modules whose forward takes it that heads * head dim is the width of the input."""
    if isinstance(plan.qkv[0], Called):
        return plan  # for the reshape of its result to tell
    weight = plan.qkv[0].weight
    if weight.shape[0] != weight.shape[1] * 3 // len(plan.qkv):
        raise Unsupported("its heads together are not as wide as its input")
    return plan


def dense_bias(bias: torch.Tensor | None, heads: int) -> dict[str, Any]:
    """A position bias as an argument of `attend`: `bias` where it has a value for every head."""
    if bias is None:
        return {}
    per_head = bias.ndim in (3, 4) and bias.shape[-3] == heads and bias.shape[:-3] in ((), (1,))
    return {"bias" if per_head else "mask": bias}


def read_packed_qkv(module: Any) -> Linear | Called:
    """EVA's and BEiT's qkv. With biases of its own timm reads it, and calls it only without."""
    bias = read_packed_bias(module)
    if bias is None:
        return read_or_call_linear(module._modules, "qkv")
    return read_linear(module._modules, "qkv")._replace(bias=bias)


def read_packed_bias(module: Any) -> Computed | None:
    """The bias of EVA's and BEiT's qkv: learned for q and v, a buffer of zeros for k."""
    q_bias = read_optional_parameter(module, "q_bias")
    if q_bias is None:
        return None
    return Computed(_joined, (q_bias, module.k_bias, read_parameter(module, "v_bias")))


def _joined(*biases: torch.Tensor) -> torch.Tensor:
    return torch.cat(biases)
