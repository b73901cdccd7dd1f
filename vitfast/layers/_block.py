"""The residual block that ViT, EVA, BEiT, RelPos and Swin share.

    x = x + drop_path1(gamma1 * attn(norm1(x)))
    x = x + drop_path2(gamma2 * mlp(norm2(x)))

The residual add of the first line and the norm of the second are one pass over memory. In Swin V2
the norms come last (res-post-norm):

    x = x + drop_path1(norm1(attn(x)))
    x = x + drop_path2(norm2(mlp(x)))
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from vitfast import ops
from vitfast.layers import _attention, _guard, _inference, _mlp, _norm, layer_scale
from vitfast.layers._attention import Attention, Windows
from vitfast.layers._guard import Children, DropRate, Unfit
from vitfast.layers._mlp import Mlp
from vitfast.layers._norm import Norm
from vitfast.ops._normed import Normed
from vitfast.runtime.library import autocast_dtype


class Block(NamedTuple):
    """What a block holds. gamma: LayerScale [C] or None; None where the norms come last."""

    norm1: Norm
    attn: Attention
    gamma1: torch.Tensor | None
    drop1: DropRate | None
    norm2: Norm
    mlp: Mlp
    gamma2: torch.Tensor | None
    drop2: DropRate | None
    norms_last: bool = False


def with_layer_scale(module: nn.Module) -> Block:
    """A block whose LayerScale are modules `ls1` and `ls2` (ViT, RelPos)."""
    children = module._modules
    return _plan(children, layer_scale.child(children, "ls1"), layer_scale.child(children, "ls2"))


def with_gammas(module: nn.Module) -> Block:
    """A block whose LayerScale are parameters `gamma_1` and `gamma_2` (EVA, BEiT)."""
    gammas = tuple(_guard.optional_parameter(module, f"gamma_{i}") for i in (1, 2))
    if (gammas[0] is None) != (gammas[1] is None):
        raise Unfit("it has one of gamma_1 and gamma_2")
    return _plan(module._modules, *gammas)


def without_layer_scale(module: nn.Module) -> Block:
    """A block without LayerScale (Swin)."""
    return _plan(module._modules, None, None)


def with_norms_last(module: nn.Module) -> Block:
    """A block whose norms come after attention and MLP (Swin V2)."""
    return without_layer_scale(module)._replace(norms_last=True)


def _plan(children: Children, gamma1: torch.Tensor | None, gamma2: torch.Tensor | None) -> Block:
    block = Block(
        norm1=_norm.child(children, "norm1"),
        gamma1=gamma1,
        drop1=_guard.drop_path(children, "drop_path1"),
        norm2=_norm.child(children, "norm2"),
        mlp=_mlp.child(children, "mlp"),
        gamma2=gamma2,
        drop2=_guard.drop_path(children, "drop_path2"),
        # Last, since it may compute position biases, with a dropout of their own.
        attn=_attention.child(children, "attn"),
    )
    width = block.attn.proj.weight.shape[0]  # of the stream, which the residual adds
    block.norm1.check_width(width)
    block.norm2.check_width(width)
    return block


def run(x: torch.Tensor, block: Block, **attention: Any) -> torch.Tensor:
    """The block on x [B, N, C]; keywords as for `_attention.attend`."""
    out = None
    if not _needs_ops(x, block, attention):
        out = _inference.block(x, block, **attention)
    return _differentiable(x, block, attention) if out is None else out


def attention_half(x: torch.Tensor, block: Block, windows: Windows) -> torch.Tensor:
    """x + drop_path1(gamma1 * attn(norm1(x))) alone, on a map x [B, N, C]; norms first."""
    out = None
    if not _needs_ops(x, block, {}):
        out = _inference.attention_half(x, block, windows)
    if out is not None:
        return out
    branch = _attention.attend(
        _norm.apply(x, block.norm1, operand_dtype(x)),
        block.attn,
        normed=_normed(x, block.norm1),
        windows=windows,
    )
    return add(x, branch, block.gamma1, block.drop1)


def mlp_half(x: torch.Tensor, block: Block) -> torch.Tensor:
    """x + drop_path2(gamma2 * mlp(norm2(x))) alone, on x [B, N, C]; norms first."""
    out = None
    if not _needs_ops(x, block, {}):
        out = _inference.mlp_half(x, block)
    if out is not None:
        return out
    normed = _norm.apply(x, block.norm2, operand_dtype(x))
    branch = _mlp.apply(normed, block.mlp, _normed(x, block.norm2))
    return add(x, branch, block.gamma2, block.drop2)


def _needs_ops(x: torch.Tensor, block: Block, attention: dict[str, Any]) -> bool:
    """Whether this call is traced, or recorded by autograd, or drops paths."""
    if torch.compiler.is_compiling() or block.drop1 is not None or block.drop2 is not None:
        return True
    return torch.is_grad_enabled() and any(
        t.requires_grad for t in _guard.tensors((x, block, *attention.values()))
    )


def records(x: torch.Tensor, plan: Any) -> bool:
    """Whether autograd records this call for x or the plan's tensors, or its `drop` drops paths."""
    if plan.drop is not None:
        return True
    return torch.is_grad_enabled() and _guard.records_grad(*_guard.tensors((x, plan)))


def _differentiable(x: torch.Tensor, block: Block, attention: dict[str, Any]) -> torch.Tensor:
    """Through the public ops: autograd, torch.compile and any backend."""
    operand = operand_dtype(x)
    if block.norms_last:
        branch = _attention.attend(x, block.attn, **attention)
        x = _add_normed(x, branch, block.norm1, block.drop1)
        return _add_normed(x, _mlp.apply(x, block.mlp), block.norm2, block.drop2)
    branch = _attention.attend(
        _norm.apply(x, block.norm1, operand),
        block.attn,
        normed=_normed(x, block.norm1),
        **attention,
    )
    x, normed = ops.add_norm(
        x,
        branch,
        block.norm2.weight,
        block.norm2.bias,
        block.norm2.eps,
        gamma=block.gamma1,
        drop_scale=drop_scale(branch, block.gamma1, block.drop1),
        norm=block.norm2.kind,
        out_dtype=operand,
    )
    branch = _mlp.apply(normed, block.mlp, _normed(x, block.norm2))
    return add(x, branch, block.gamma2, block.drop2)


def add(
    x: torch.Tensor, branch: torch.Tensor, gamma: torch.Tensor | None, drop: DropRate | None
) -> torch.Tensor:
    return ops.residual_add(x, branch, gamma=gamma, drop_scale=drop_scale(branch, gamma, drop))


def _add_normed(
    x: torch.Tensor, branch: torch.Tensor, norm: Norm, drop: DropRate | None
) -> torch.Tensor:
    return ops.norm_add(
        x,
        branch,
        norm.weight,
        norm.bias,
        norm.eps,
        drop_scale=drop_scale(branch, None, drop),
        norm=norm.kind,
    )


def _normed(source: torch.Tensor, norm: Norm) -> Normed:
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
