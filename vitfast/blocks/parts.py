"""What the blocks are made of, each by the public ops: attention, MLP, norms, residual adds."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vitfast import ops
from vitfast.engine.eligibility import records_grad
from vitfast.engine.products import conv as conv_product
from vitfast.ops.common.recompute import Normed
from vitfast.plans import (
    Attention,
    Called,
    Conv,
    DropRate,
    GroupNorm,
    Linear,
    Mlp,
    Norm,
    Sequences,
    Windows,
    prologue,
    split_heads,
)
from vitfast.runtime.library import autocast_dtype


def apply_mlp(x: torch.Tensor, plan: Mlp, normed: Normed | None = None) -> torch.Tensor:
    """What timm's forward computes for x [..., C], by the differentiable ops.

    Args:
        normed: how x came from the residual stream, which then is all that is saved.
    """
    called = plan.act_module is not None or isinstance(plan.fc2, Called)
    if plan.norm is None and plan.gate is None and not called:
        fc1, fc2 = plan.fc1, plan.fc2
        return ops.mlp(
            x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, plan.act,
            gate=plan.packed, normed=normed, grn=plan.grn,
        )  # fmt: skip
    hidden = _hidden_of_mlp(x, plan)
    if plan.norm is not None:
        hidden = apply_norm(hidden, plan.norm)
    return project(hidden, plan.fc2)


def _hidden_of_mlp(x: torch.Tensor, plan: Mlp) -> torch.Tensor:
    act = plan.act_module
    if act is None:
        gate_weight, gate_bias = plan.gate or (None, None)
        return ops.linear_act(
            x,
            plan.fc1.weight,
            plan.fc1.bias,
            plan.act,
            gate=plan.packed,
            gate_weight=gate_weight,
            gate_bias=gate_bias,
        )
    if plan.gate is not None:
        gate, value = project(x, plan.gate), project(x, plan.fc1)
    elif plan.packed is None:
        return act(project(x, plan.fc1))
    else:
        gate, value = project(x, plan.fc1).chunk(2, -1)
        if plan.packed == "last":
            gate, value = value, gate
    return act(gate) * value


def apply_group_norm(
    x: torch.Tensor, norm: GroupNorm, residual: torch.Tensor | None = None, act: str | None = None
) -> torch.Tensor:
    """A map x [B, C, H, W] by the differentiable op; `act` instead of the norm's own."""
    return ops.group_norm_act(
        x, norm.groups, norm.weight, norm.bias, norm.eps, residual=residual, act=act or norm.act
    )


def add_residual(
    x: torch.Tensor, branch: torch.Tensor, gamma: torch.Tensor | None, drop: DropRate | None
) -> torch.Tensor:
    """x + drop_path(gamma * branch) of tensors [B, ..., C], by the differentiable op."""
    return ops.residual_add(x, branch, gamma=gamma, drop_scale=drop_scale(branch, gamma, drop))


def add_normed(
    x: torch.Tensor, branch: torch.Tensor, norm: Norm, drop: DropRate | None
) -> torch.Tensor:
    """x + drop_path(norm(branch)) of tensors [B, ..., C], by the differentiable op."""
    return ops.norm_add(
        x,
        branch,
        norm.weight,
        norm.bias,
        norm.eps,
        drop_scale=drop_scale(branch, None, drop),
        norm=norm.kind,
    )


def normed_from(source: torch.Tensor, norm: Norm) -> Normed:
    """How a norm of the residual stream was made, for the backward to make it again."""
    return Normed(source, norm.weight, norm.bias, norm.eps, norm.kind)


def operand_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype in which a norm of x may be written for the matrix product that follows it.

    Under autocast timm rounds a float32 norm's result to the autocast dtype in that product; the
    norm can do so as well as the product. Any other input would be rounded twice by timm.
    """
    return autocast_dtype(x.device) if x.dtype == torch.float32 else None


def drop_scale(
    branch: torch.Tensor, gamma: torch.Tensor | None, rate: DropRate | None
) -> torch.Tensor | None:
    """[B] factors drawn as `timm.layers.drop_path` draws them: shape, dtype and so RNG alike."""
    if rate is None:
        return None
    dtype = branch.dtype if gamma is None else torch.promote_types(branch.dtype, gamma.dtype)
    shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
    factors = branch.new_empty(shape, dtype=dtype).bernoulli_(rate.keep)
    if rate.keep > 0 and rate.scale_by_keep:
        factors.div_(rate.keep)
    return factors.flatten()


def norm_2d_dtype(dtype: torch.dtype, norm: Norm) -> torch.dtype | None:
    """That of a RmsNorm2d's result, of an input of this dtype: timm multiplies in plain torch."""
    if norm.kind != "rms" or norm.weight is None:
        return None
    return torch.promote_types(dtype, norm.weight.dtype)


def apply_norm(x: torch.Tensor, norm: Norm, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """x [..., C] normalised, by the differentiable ops."""
    if norm.kind == "rms":
        return ops.rms_norm(x, norm.weight, norm.eps, out_dtype=out_dtype)
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps, out_dtype=out_dtype)


def attend(
    x: torch.Tensor,
    plan: Attention,
    *,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    rope: torch.Tensor | None = None,
    is_causal: bool = False,
    normed: Normed | None = None,
    windows: Windows | None = None,
    sequences: Sequences | None = None,
) -> torch.Tensor:
    """What timm's fused forward computes for x [B, N, C], by the differentiable ops.

    Args:
        windows: where attention is within windows; then without the other terms.
        sequences: of the rows of x [1, total, C]; then without mask, bias and causality, and with
            a rotary embedding of all tokens, as `ops.varlen_attention` takes it.
        normed: how x came from the residual stream, which then is all that is saved.
    """
    plan = plan.computed()
    qkv = split_heads([project(x, layer, normed) for layer in plan.qkv], plan)
    if sequences is not None:
        q, k, v = (t[0] for t in qkv) if len(qkv) == 3 else (qkv[0][0], None, None)
        options = prologue(plan, rope)
        options.pop("rope_prefix", None)
        out = ops.varlen_attention(
            q, k, v, sequences.cu_seqlens, max_seqlen=sequences.longest, **options
        )
        out = out.flatten(1)[None]
    elif windows is None:
        out = ops.attention(
            *qkv, mask=mask, bias=bias, is_causal=is_causal, **prologue(plan, rope)
        ).flatten(2)
    else:
        (packed,) = qkv
        out = ops.window_attention(
            packed.unflatten(1, windows.size), windows.window, windows.shift, plan.table,
            plan.padding(windows), plan.logit_scale, grid=windows.grid,
        ).flatten(3).flatten(1, 2)  # fmt: skip
    if plan.norm is not None:
        out = apply_norm(out, plan.norm)
    return project(out, plan.proj)


def project(x: torch.Tensor, layer: Linear | Called, normed: Normed | None = None) -> torch.Tensor:
    """A linear layer on x [..., C], `normed` as in `attend`."""
    if isinstance(layer, Called):
        return layer.module(x)
    return ops.linear_act(x, *layer, normed=normed)


def apply_conv(x: torch.Tensor, conv: Conv) -> torch.Tensor:
    """The convolution of a map x [B, C, H, W]; the result has x's memory format."""
    last = x.ndim == 4 and conv_product.channels_last(x)
    call = (
        conv_product.direct(x)
        if last and conv.weight.ndim == 4 and conv_product.covers(x, conv)
        else None
    )
    if call is not None:
        packed = conv_product.prepare_fitting(call, conv, x.shape[1])
        if packed is not None:
            return packed(x.to(call.dtype))
    weight = conv.weight
    if conv.eps is None:
        pass
    elif torch.compiler.is_compiling() or last or records_grad(x, *conv[:2]):
        weight = conv_product.standardised(weight, conv.eps, last)
    else:
        weight = conv_product.plain_weight(conv)
    padding = conv.padding
    if conv.same:
        left, right, top, bottom = found = conv_product.pads(conv, *x.shape[-2:])
        if left == right and top == bottom:
            padding = (top, left)
        else:
            x, padding = F.pad(x, found), (0, 0)
    return F.conv2d(x, weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)
