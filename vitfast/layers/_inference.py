"""The block in inference on the CPU: native kernels called directly, rows in cache-sized chunks.

Without autograd everything but the attention works row by row. So the rows go through in chunks: a
chunk's norm, its qkv; after the attention its projection with LayerScale and residual, its norm, its
MLP. The MLP's wide hidden tensor exists for one chunk only, and stays in cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vitfast.layers import _attention
from vitfast.layers._guard import Linear
from vitfast.layers._norm import Norm
from vitfast.ops import _gemm
from vitfast.ops import _norm as norm_op
from vitfast.ops.attention import native as attention_op
from vitfast.runtime import native
from vitfast.runtime.library import autocast_dtype
from vitfast.settings import settings

if TYPE_CHECKING:
    from vitfast.layers._attention import Attention
    from vitfast.layers._block import Block

CHUNK_ROWS = 1024
WHOLE_ROWS = 2048
"""Up to so many rows go through as one chunk."""


def block(
    x: torch.Tensor,
    plan: Block,
    *,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    rope: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor | None:
    """The block on x [B, N, C], or None where it takes the public ops to compute or to complain.

    The result has the dtype that the residual stream has in timm.
    """
    operand = autocast_dtype(x.device) or x.dtype
    stream = _stream_dtype(x, plan, operand)
    if stream is None or not _fits(x, plan, operand, mask, bias, rope):
        return None
    batch, tokens, channels = x.shape
    x = x.reshape(-1, channels)
    chunks = _chunks(len(x))
    normed = _gemm.empty((chunks[0].stop, channels), operand)

    qkv = _projected(x, plan, operand, chunks, normed)
    qkv = _attention.split_heads([t.unflatten(0, (batch, tokens)) for t in qkv], plan.attn)
    q, k, v = qkv if len(qkv) == 3 else qkv[0].unbind(2)
    attended = attention_op.forward_direct(
        q,
        k,
        v,
        scale=q.shape[-1] ** -0.5,
        mask=mask,
        bias=bias,
        is_causal=is_causal,
        out=torch.empty(q.shape, dtype=operand),
        **_attention.prologue(plan.attn, rope),
    )
    out = _gemm.empty(x.shape, stream)
    _finish(x, attended.view(len(x), -1), plan, operand, chunks, normed, out)
    return out.view(batch, tokens, channels)


def _projected(
    x: torch.Tensor, plan: Block, operand: torch.dtype, chunks: list[slice], normed: torch.Tensor
) -> list[torch.Tensor]:
    """norm1 and the projection(s) to q, k and v: [rows, 3 A], or three of [rows, A]."""
    layers = [_gemm.prepare(*linear, len(x), operand) for linear in plan.attn.qkv]
    results = [_gemm.empty((len(x), layer.width), operand) for layer in layers]
    for chunk in chunks:
        rows = x[chunk]
        part = _normalise(rows, plan.norm1, normed[: len(rows)])
        for layer, result in zip(layers, results, strict=True):
            _gemm.apply(layer, part, out=result[chunk])
    return results


def _finish(
    x: torch.Tensor,
    attended: torch.Tensor,
    plan: Block,
    operand: torch.dtype,
    chunks: list[slice],
    normed: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Everything after the attention, into `out` [rows, C]."""
    mlp = plan.mlp
    gate_weight, gate_bias = mlp.gate or (None, None)
    proj = _gemm.prepare(*plan.attn.proj, len(x), operand)
    fc1 = _gemm.prepare(
        *mlp.fc1, len(x), operand, gate=mlp.packed, gate_weight=gate_weight, gate_bias=gate_bias
    )
    fc2 = _gemm.prepare(*mlp.fc2, len(x), operand)
    wide = _gemm.empty((chunks[0].stop, fc1.width), operand)
    for chunk in chunks:
        part, stream = attended[chunk], out[chunk]
        if plan.attn.norm is not None:
            part = _normalise(part, plan.attn.norm, part)
        _gemm.apply(proj, part, residual=x[chunk], gamma=plan.gamma1, out=stream)
        part = _normalise(stream, plan.norm2, normed[: len(stream)])
        hidden = _gemm.apply(fc1, part, mlp.act, out=wide[: len(stream)])
        if mlp.norm is not None:
            hidden = _normalise(hidden, mlp.norm, hidden)
        _gemm.apply(fc2, hidden, residual=stream, gamma=plan.gamma2, out=stream)


def _normalise(x: torch.Tensor, norm: Norm, out: torch.Tensor) -> torch.Tensor:
    norm_op.forward(
        norm_op.KINDS[norm.kind],
        x,
        weight=norm.weight,
        bias=norm.bias,
        eps=norm.eps,
        normed_out=out,
    )
    return out


def _chunks(rows: int) -> list[slice]:
    """Consecutive row ranges, the first the largest."""
    if rows <= WHOLE_ROWS:
        return [slice(0, rows)]
    return [slice(i, min(i + CHUNK_ROWS, rows)) for i in range(0, rows, CHUNK_ROWS)]


def _stream_dtype(x: torch.Tensor, plan: Block, operand: torch.dtype) -> torch.dtype | None:
    """The dtype of x + gamma * branch; None where LayerScale changes it on the way."""
    dtypes = {
        torch.promote_types(x.dtype, operand if gamma is None else gamma.dtype)
        for gamma in (plan.gamma1, plan.gamma2)
    }
    return dtypes.pop() if len(dtypes) == 1 else None


def _fits(
    x: torch.Tensor,
    plan: Block,
    operand: torch.dtype,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    rope: torch.Tensor | None,
) -> bool:
    """Whether dtypes, devices and sizes are those the kernels take unchecked."""
    if native.reasons() or settings.backend not in ("auto", "cpu") or x.ndim != 3 or not x.numel():
        return False
    attn, mlp = plan.attn, plan.mlp
    tokens, channels = x.shape[1:]
    lowered = operand != x.dtype
    width, hidden = attn.proj.weight.shape[1], mlp.fc2.weight.shape[1]
    dim = width // attn.heads
    shared = width // attn.kv_groups
    widths = (width, shared, shared) if len(attn.qkv) == 3 else (3 * width,)
    return (
        _of(x, operand=operand)
        and dim * attn.heads == width
        and dim <= 256
        and all(
            _linear(linear, size, channels, operand, lowered)
            for linear, size in zip(attn.qkv, widths, strict=True)
        )
        and _linear(attn.proj, channels, width, operand, lowered)
        and _linear(mlp.fc1, 2 * hidden if mlp.packed else hidden, channels, operand, lowered)
        and (mlp.gate is None or _linear(mlp.gate, hidden, channels, operand, lowered))
        and _linear(mlp.fc2, channels, hidden, operand, lowered)
        and _vectors(channels, plan.gamma1, plan.gamma2)
        and all(
            norm is None or _vectors(size, norm.weight, norm.bias)
            for norm, size in (
                (plan.norm1, channels),
                (plan.norm2, channels),
                (attn.norm, width),
                (mlp.norm, hidden),
                (attn.q_norm, dim),
                (attn.k_norm, dim),
            )
        )
        and all(t is None or _addend(t) for t in (mask, bias))
        and (rope is None or _rope(rope, attn, x.shape[0], tokens, dim))
    )


def _of(t: torch.Tensor, operand: torch.dtype | None = None) -> bool:
    dtypes = norm_op.DTYPES
    return (
        t.dtype in dtypes and t.device.type == "cpu" and (operand is None or operand in dtypes)
    )


def _linear(
    linear: Linear, out: int, inner: int, operand: torch.dtype, lowered: bool
) -> bool:
    weight, bias = linear
    return (
        weight.shape == (out, inner)
        and _of(weight)
        and (lowered or weight.dtype == operand)
        and (bias is None or (_vectors(out, bias) and (lowered or bias.dtype == operand)))
    )


def _vectors(size: int, *vectors: torch.Tensor | None) -> bool:
    return all(v is None or (v.shape == (size,) and _of(v)) for v in vectors)


def _addend(t: torch.Tensor) -> bool:
    """A mask or bias; its shape is checked where it is broadcast."""
    return t.device.type == "cpu" and (t.dtype == torch.bool or t.dtype in norm_op.DTYPES)


def _rope(rope: torch.Tensor, attn: Attention, batch: int, tokens: int, dim: int) -> bool:
    """As `ops.attention` wants it: [N', 2D], [H, N', 2D] or [B|1, H|1, N', 2D]."""
    leading = rope.shape[:-2]
    return (
        rope.ndim in (2, 3, 4)
        and rope.shape[-2:] == (tokens - attn.prefix, 2 * dim)
        and dim % 2 == 0
        and all(n in (1, most) for n, most in zip(leading[::-1], (attn.heads, batch), strict=False))
        and rope.device.type == "cpu"
        and rope.dtype != torch.float64
    )
