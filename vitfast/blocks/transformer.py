"""The residual block that ViT, EVA, BEiT, RelPos and Swin share.

    x = x + drop_path1(gamma1 * attn(norm1(x)))
    x = x + drop_path2(gamma2 * mlp(norm2(x)))

The residual add of the first line and the norm of the second are one pass over memory. In Swin V2
the norms come last (res-post-norm):

    x = x + drop_path1(norm1(attn(x)))
    x = x + drop_path2(norm2(mlp(x)))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vitfast import ops
from vitfast.blocks.launched import through_list
from vitfast.blocks.parts import (
    add_normed,
    add_residual,
    apply_mlp,
    apply_norm,
    attend,
    drop_scale,
    normed_from,
    operand_dtype,
)
from vitfast.engine import donation, memo
from vitfast.engine import transformer as engine
from vitfast.engine.eligibility import PLAIN, takes_engine
from vitfast.plans import Called, Sequences, TransformerBlock

Maps = tuple[tuple[int, int] | None, tuple[int, int] | None]
"""By half: rows and columns of the map that timm's forward computes it on; None: on tokens."""


def run_transformer_block(
    x: torch.Tensor,
    block: TransformerBlock,
    module: Any,
    attend: Callable[[torch.Tensor], torch.Tensor],
    maps: Maps = (None, None),
    **attention: Any,
) -> torch.Tensor:
    """The block on x [B, N, C]; keywords as of `parts.attend`.

    Args:
        module, attend, maps: whose children are called where a half is not read; its attention
            with what timm passes to it; on what timm computes.
    """
    if type(block.attn) is Called or type(block.mlp) is Called:
        donation.withdraw()
    if type(block.attn) is Called:
        x = _call_half(x, module, 1, attend, block.norms_last, maps[0])
        # A hook there may have changed what is still to come.
        second = memo.recall_plan(type(module).plan, module, x) or block._replace(mlp=Called(""))
        return run_mlp_half(x, second, module, maps[1])
    if type(block.mlp) is Called:
        return run_mlp_half(run_attention_half(x, block, **attention), block, module, maps[1])
    out = None
    if takes_engine(x, block, *attention.values()):
        out = engine.block(x, block, **attention)
    return through_list(_differentiable, x, block, **attention) if out is None else out


def run_packed_block(
    x: torch.Tensor,
    block: TransformerBlock,
    sequences: Sequences,
    rope: torch.Tensor | None = None,
) -> torch.Tensor:
    """The block on the rows x [1, total, C] of several sequences, all of it read.

    Args:
        rope: of all tokens, as `ops.varlen_attention` takes it.
    """
    out = None
    if takes_engine(x, block, rope):
        out = engine.packed_block(x, block, sequences, rope)
    return _differentiable(x, block, rope=rope, sequences=sequences) if out is None else out


def _call_half(
    x: torch.Tensor,
    module: Any,
    number: int,
    inner: Callable[[torch.Tensor], torch.Tensor],
    norms_last: bool,
    size: tuple[int, int] | None,
) -> torch.Tensor:
    """The first or second half of the block as timm's forward computes it, on x [B, N, C]."""
    if size is not None:
        x = x.unflatten(1, size)
    children = module._modules
    norm, scale = children[f"norm{number}"], children.get(f"ls{number}")
    branch = norm(inner(x)) if norms_last else inner(norm(x))
    gamma = getattr(module, f"gamma_{number}", None)
    if scale is not None:
        branch = scale(branch)
    elif gamma is not None:
        branch = gamma * branch
    x = x + children[f"drop_path{number}"](branch)
    return x if size is None else x.flatten(1, 2)


def run_mlp_half(
    x: torch.Tensor, block: TransformerBlock, module: nn.Module, size: tuple[int, int] | None = None
) -> torch.Tensor:
    """The second half of the block on x [B, N, C], read or called. size: of the map in timm."""
    # What was called before may have given a tensor of any class.
    if type(block.mlp) is Called or type(x) not in PLAIN:
        mlp = module._modules["mlp"]
        return _call_half(x, module, 2, mlp, block.norms_last, size)  # type: ignore[arg-type]
    out = None
    if takes_engine(x, block):
        out = engine.block(x, block, half="mlp")
    if out is not None:
        return out
    return through_list(_mlp_half, x, block)


def _mlp_half(x: torch.Tensor, block: TransformerBlock) -> torch.Tensor:
    """The second half of the block, through the public ops."""
    if block.norms_last:
        return add_normed(x, apply_mlp(x, block.mlp), block.norm2, block.drop2)
    normed = apply_norm(x, block.norm2, operand_dtype(x))
    branch = apply_mlp(normed, block.mlp, normed_from(x, block.norm2))
    return add_residual(x, branch, block.gamma2, block.drop2)


def run_attention_half(x: torch.Tensor, block: TransformerBlock, **attention: Any) -> torch.Tensor:
    """x + gamma1 * attn(norm1(x)) of x [B, N, C] alone; keywords as of `parts.attend`."""
    out = None
    if takes_engine(x, block, *attention.values()):
        out = engine.block(x, block, half="attention", **attention)
    return through_list(_attention_half, x, block, **attention) if out is None else out


def _attention_half(x: torch.Tensor, block: TransformerBlock, **attention: Any) -> torch.Tensor:
    """The first half of the block, through the public ops."""
    branch = _attend(x, block, attention)
    if block.norms_last:
        return add_normed(x, branch, block.norm1, block.drop1)
    return add_residual(x, branch, block.gamma1, block.drop1)


def _attend(x: torch.Tensor, block: TransformerBlock, attention: dict[str, Any]) -> torch.Tensor:
    """attn(norm1(x)), or attn(x) where the norms come last."""
    if block.norms_last:
        return attend(x, block.attn, **attention)
    return attend(
        apply_norm(x, block.norm1, operand_dtype(x)),
        block.attn,
        normed=normed_from(x, block.norm1),
        **attention,
    )


def _differentiable(x: torch.Tensor, block: TransformerBlock, **attention: Any) -> torch.Tensor:
    """Through the public ops: autograd, torch.compile and any backend."""
    branch = _attend(x, block, attention)
    if block.norms_last:
        x = add_normed(x, branch, block.norm1, block.drop1)
        return add_normed(x, apply_mlp(x, block.mlp), block.norm2, block.drop2)
    x, normed = ops.add_norm(
        x,
        branch,
        block.norm2.weight,
        block.norm2.bias,
        block.norm2.eps,
        gamma=block.gamma1,
        drop_scale=drop_scale(branch, block.gamma1, block.drop1),
        norm=block.norm2.kind,
        out_dtype=operand_dtype(x),
    )
    branch = apply_mlp(normed, block.mlp, normed_from(x, block.norm2))
    return add_residual(x, branch, block.gamma2, block.drop2)
