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
from functools import partial
from typing import Any

import torch
from torch import nn

from vitfast import ops
from vitfast.engine import memo
from vitfast.engine import transformer as engine
from vitfast.engine.eligibility import PLAIN, needs_ops
from vitfast.layers import _attention, _guard, _mlp, _norm, layer_scale
from vitfast.layers._guard import Children
from vitfast.ops.common.recompute import Normed
from vitfast.plans import Attention, Called, DropRate, Mlp, Norm, TransformerBlock
from vitfast.runtime.library import autocast_dtype

Maps = tuple[tuple[int, int] | None, tuple[int, int] | None]
"""By half: rows and columns of the map that timm's forward computes it on; None: on tokens."""


def with_layer_scale(module: nn.Module) -> TransformerBlock:
    """A block whose LayerScale are modules `ls1` and `ls2` (ViT, RelPos)."""
    return _plan(module, lambda i: layer_scale.child(module._modules, f"ls{i}"))


def with_gammas(module: nn.Module) -> TransformerBlock:
    """A block whose LayerScale are parameters `gamma_1` and `gamma_2`, one or both (EVA, BEiT)."""
    return _plan(module, lambda i: _guard.optional_parameter(module, f"gamma_{i}"))


def without_layer_scale(module: nn.Module) -> TransformerBlock:
    """A block without LayerScale (Swin)."""
    return _plan(module, lambda i: None)


def with_norms_last(module: nn.Module) -> TransformerBlock:
    """A block whose norms come after attention and MLP (Swin V2)."""
    return without_layer_scale(module)._replace(norms_last=True)


def _plan(module: nn.Module, gamma: Callable[[int], torch.Tensor | None]) -> TransformerBlock:
    """Both halves, as far as they can be read.

    Raises:
        Unfit: neither can.
    """
    children = module._modules

    def half(i: int, read: Callable[[Children], tuple[Any, int]]) -> tuple:
        norm, scale = _norm.child(children, f"norm{i}"), gamma(i)
        drop = _guard.drop_path(children, f"drop_path{i}")
        inner, width = read(children)
        norm.check_width(width)
        _guard.vector(scale, width, "layer scale")
        return norm, inner, scale, drop

    # Attention last, since it may compute position biases, with a dropout of their own.
    reads = partial(half, 2, _mlp_and_width), partial(half, 1, _attention_and_width)
    second, first = (
        (None, found, None, None) if type(found) is Called else found
        for found in _guard.parts(*reads)
    )
    return TransformerBlock(*first, *second)


def _attention_and_width(children: Children) -> tuple[Attention, int]:
    found = _attention.child(children, "attn")
    return found, found.proj.weight.shape[0]


def _mlp_and_width(children: Children) -> tuple[Mlp, int]:
    found = _mlp.child(children, "mlp")
    return found, found.fc2.weight.shape[0]


def run(
    x: torch.Tensor,
    block: TransformerBlock,
    module: nn.Module,
    attend: Callable[[torch.Tensor], torch.Tensor],
    maps: Maps = (None, None),
    **attention: Any,
) -> torch.Tensor:
    """The block on x [B, N, C]; keywords as for `_attention.attend`.

    Args:
        module, attend, maps: whose children are called where a half is not read; its attention
            with what timm passes to it; on what timm computes.
    """
    if type(block.attn) is Called:
        x = _call_half(x, module, 1, attend, block.norms_last, maps[0])
        # A hook there may have changed what is still to come.
        second = memo.recall_plan(type(module).plan, module, x) or block._replace(mlp=Called(""))
        return run_mlp(x, second, module, maps[1])
    if type(block.mlp) is Called:
        return run_mlp(attention_half(x, block, **attention), block, module, maps[1])
    out = None
    if not needs_ops(x, block, attention):
        out = engine.block(x, block, **attention)
    return _differentiable(x, block, attention) if out is None else out


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


def run_mlp(
    x: torch.Tensor, block: TransformerBlock, module: nn.Module, size: tuple[int, int] | None = None
) -> torch.Tensor:
    """The second half of the block on x [B, N, C], read or called. size: of the map in timm."""
    # What was called before may have given a tensor of any class.
    if type(block.mlp) is Called or type(x) not in PLAIN:
        mlp = module._modules["mlp"]
        return _call_half(x, module, 2, mlp, block.norms_last, size)  # type: ignore[arg-type]
    out = None
    if not needs_ops(x, block, {}):
        out = engine.block(x, block, half="mlp")
    if out is not None:
        return out
    if block.norms_last:
        return _add_normed(x, _mlp.apply(x, block.mlp), block.norm2, block.drop2)
    normed = _norm.apply(x, block.norm2, operand_dtype(x))
    branch = _mlp.apply(normed, block.mlp, _normed(x, block.norm2))
    return add(x, branch, block.gamma2, block.drop2)


def attention_half(x: torch.Tensor, block: TransformerBlock, **attention: Any) -> torch.Tensor:
    """The first half of the block alone, as `run`."""
    out = None
    if not needs_ops(x, block, attention):
        out = engine.block(x, block, half="attention", **attention)
    if out is not None:
        return out
    branch = _attend(x, block, attention)
    if block.norms_last:
        return _add_normed(x, branch, block.norm1, block.drop1)
    return add(x, branch, block.gamma1, block.drop1)


def _attend(x: torch.Tensor, block: TransformerBlock, attention: dict[str, Any]) -> torch.Tensor:
    """attn(norm1(x)), or attn(x) where the norms come last."""
    if block.norms_last:
        return _attention.attend(x, block.attn, **attention)
    return _attention.attend(
        _norm.apply(x, block.norm1, operand_dtype(x)),
        block.attn,
        normed=_normed(x, block.norm1),
        **attention,
    )


def _differentiable(
    x: torch.Tensor, block: TransformerBlock, attention: dict[str, Any]
) -> torch.Tensor:
    """Through the public ops: autograd, torch.compile and any backend."""
    branch = _attend(x, block, attention)
    if block.norms_last:
        x = _add_normed(x, branch, block.norm1, block.drop1)
        return _add_normed(x, _mlp.apply(x, block.mlp), block.norm2, block.drop2)
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
