"""Whether the engine's kernels, which check nothing, can take a call."""

from __future__ import annotations

from collections.abc import Collection

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.dwconv_norm.native import WIDEST
from vitfast.ops.window_attention.native import MOST_TOKENS
from vitfast.plans import (
    Attention,
    ConvNeXtBlock,
    Linear,
    Mlp,
    MlpResidual,
    Norm,
    TransformerBlock,
    Windows,
)

MOST_HEAD_DIM = 256
"""The attention kernel's limit."""
_DTYPES = frozenset(norm_op.DTYPES)


def stream_dtype(
    x: torch.Tensor, plan: TransformerBlock, operand: torch.dtype, half: str
) -> torch.dtype | None:
    """The dtype of x + gamma * branch; None where LayerScale changes it on the way."""
    gammas = {"attention": (plan.gamma1,), "mlp": (plan.gamma2,)}
    dtypes = {
        torch.promote_types(x.dtype, operand if gamma is None else gamma.dtype)
        for gamma in gammas.get(half, (plan.gamma1, plan.gamma2))
    }
    return dtypes.pop() if len(dtypes) == 1 else None


def dtypes_fit(x: torch.Tensor, autocast: torch.dtype | None) -> bool:
    """Whether there are kernels for the elements of x, and of products in autocast's dtype."""
    return x.numel() > 0 and {x.dtype, autocast or x.dtype} <= _DTYPES


def block(
    x: torch.Tensor,
    plan: TransformerBlock,
    autocast: torch.dtype | None,
    windows: Windows | None,
    half: str,
) -> bool:
    """Whether dtypes, devices and sizes are those the kernels take unchecked.

    half: as of `steps.PreparedBlock`.
    """
    if x.ndim != 3 or not dtypes_fit(x, autocast):
        return False
    channels = x.shape[2]
    # Without autocast timm wants one dtype, and it is for the ops to complain.
    dtypes = norm_op.DTYPES if autocast else (x.dtype,)
    if half != "mlp":
        first = _attention(plan.attn, channels, dtypes, windows)
        if not (first and _residual(plan.norm1, plan.gamma1, channels)):
            return False
    if half == "attention":
        return True
    return _mlp(plan.mlp, channels, dtypes) and _residual(plan.norm2, plan.gamma2, channels)


def _attention(
    attn: Attention,
    channels: int,
    dtypes: Collection[torch.dtype],
    windows: Windows | None,
) -> bool:
    width = attn.proj.weight.shape[-1]
    dim, shared = width // attn.heads, width // attn.kv_groups
    sizes = (width, shared, shared) if len(attn.qkv) == 3 else (3 * width,)
    return (
        linear(attn.proj, channels, width, dtypes)
        and all(linear(*one, channels, dtypes) for one in zip(attn.qkv, sizes, strict=True))
        and _norm(attn.norm, width)
        and _norm(attn.q_norm, dim)
        and _norm(attn.k_norm, dim)
        and dim * attn.heads == width
        and dim <= MOST_HEAD_DIM
        and (windows is None or _windows(windows, attn))
    )


def _mlp(mlp: Mlp, channels: int, dtypes: Collection[torch.dtype]) -> bool:
    hidden = mlp.fc2.weight.shape[-1]
    return (
        linear(mlp.fc1, 2 * hidden if mlp.packed else hidden, channels, dtypes)
        and linear(mlp.fc2, channels, hidden, dtypes)
        and (mlp.gate is None or linear(mlp.gate, hidden, channels, dtypes))
        and _norm(mlp.norm, hidden)
    )


def _residual(norm: Norm, gamma: torch.Tensor | None, channels: int) -> bool:
    return _norm(norm, channels) and vector(gamma, channels)


def _norm(norm: Norm | None, size: int) -> bool:
    return norm is None or (vector(norm.weight, size) and vector(norm.bias, size))


def terms(
    x: torch.Tensor,
    plan: TransformerBlock,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    rope: torch.Tensor | None,
) -> bool:
    """Whether the attention kernel takes this mask, bias and rotary embedding."""
    batch, tokens, _ = x.shape
    dim = plan.attn.proj.weight.shape[-1] // plan.attn.heads
    return (
        _addend(mask)
        and _addend(bias)
        and (rope is None or _rope(rope, plan.attn, batch, tokens, dim))
    )


def _windows(windows: Windows, attn: Attention) -> bool:
    """Whether the window kernel takes these windows, table and logit scale."""
    rows, columns = windows.window
    positions = (2 * rows - 1) * (2 * columns - 1)
    return (
        rows * columns <= MOST_TOKENS
        and (attn.table is None or tensor(attn.table, (positions, attn.heads), norm_op.DTYPES))
        and vector(attn.logit_scale, attn.heads)
    )


def tensor(t: torch.Tensor, shape: tuple[int, ...], dtypes: Collection[torch.dtype]) -> bool:
    return t.shape == shape and t.dtype in dtypes and t.is_cpu


def convnext(x: torch.Tensor, plan: ConvNeXtBlock, autocast: torch.dtype | None) -> bool:
    """Whether the kernels take this block of ConvNeXt, of a map x [B, H, W, C]."""
    return convolved(x, plan, autocast) and len(plan.mlp.fc2.weight) == x.shape[3]


def convolved(x: torch.Tensor, plan: ConvNeXtBlock, autocast: torch.dtype | None) -> bool:
    """Whether the kernels take mlp(norm(conv(x))), whose width may be another than that of x."""
    if x.ndim != 4 or not dtypes_fit(x, autocast):
        return False
    channels = x.shape[3]
    dtypes = norm_op.DTYPES if autocast else (x.dtype,)
    mlp = plan.mlp
    hidden, width = len(mlp.fc1.weight), len(mlp.fc2.weight)
    return (
        depthwise(plan.conv, channels, dtypes)
        and isinstance(plan.norm, Norm)
        and _norm(plan.norm, channels)
        and mlp.norm is None
        and linear(mlp.fc1, hidden, channels, dtypes)
        and linear(mlp.fc2, width, hidden, dtypes)
        and (mlp.grn is None or all(vector(t, hidden) for t in mlp.grn[:2]))
        and vector(plan.gamma, width)
    )


def depthwise(layer: Linear, channels: int, dtypes: Collection[torch.dtype]) -> bool:
    """Whether a depthwise convolution has so many channels."""
    kernel, bias = layer
    return (
        kernel.ndim == 4
        and max(kernel.shape[2:]) <= WIDEST
        and tensor(kernel, (channels, 1, *kernel.shape[2:]), dtypes)
        and vector(bias, channels, dtypes)
    )


def mlp_residual(
    x: torch.Tensor, y: torch.Tensor, plan: MlpResidual, autocast: torch.dtype | None
) -> bool:
    """Whether the kernels take x + gamma * mlp(y), of maps x and y [B, H, W, C]."""
    if (
        x.ndim != 4
        or x.shape != y.shape
        or not y.is_cpu
        or not (dtypes_fit(x, autocast) and dtypes_fit(y, autocast))
    ):
        return False
    channels, mlp = x.shape[3], plan.mlp
    dtypes = norm_op.DTYPES if autocast else (x.dtype,)
    hidden = len(mlp.fc1.weight)
    return (
        (autocast is not None or y.dtype == x.dtype)
        and mlp.norm is None
        and mlp.grn is None
        and linear(mlp.fc1, hidden, channels, dtypes)
        and linear(mlp.fc2, channels, hidden, dtypes)
        and vector(plan.gamma, channels)
    )


def linear(
    layer: Linear, rows: int, columns: int, dtypes: Collection[torch.dtype] = norm_op.DTYPES
) -> bool:
    """Whether a linear layer, or 1x1 convolution, has these sizes."""
    weight, bias = layer
    shape = (rows, columns, *(1,) * (weight.ndim - 2))
    return tensor(weight, shape, dtypes) and vector(bias, rows, dtypes)


def vector(
    t: torch.Tensor | None, size: int, dtypes: Collection[torch.dtype] = norm_op.DTYPES
) -> bool:
    return t is None or tensor(t, (size,), dtypes)


def _addend(t: torch.Tensor | None) -> bool:
    """A mask or bias; its shape is checked where it is broadcast."""
    return t is None or ((t.dtype == torch.bool or t.dtype in norm_op.DTYPES) and t.is_cpu)


def _rope(rope: torch.Tensor, attn: Attention, batch: int, tokens: int, dim: int) -> bool:
    """Whether the kernel takes a rotary embedding: [N', 2D], [H, N', 2D] or [B|1, H|1, N', 2D]."""
    most = (batch, attn.heads)[4 - rope.ndim :]
    return (
        rope.ndim in (2, 3, 4)
        and rope.shape[-2:] == (tokens - attn.prefix, 2 * dim)
        and dim % 2 == 0
        and all(n in (1, m) for n, m in zip(rope.shape, most, strict=False))
        and rope.is_cpu
        and rope.dtype in norm_op.DTYPES
    )
