"""The block in inference on the CPU: native kernels called directly, rows in cache-sized chunks.

Without autograd everything but the attention works row by row. So the rows go through in chunks: a
chunk's norm and qkv; after the attention its projection with LayerScale and residual, its norm, its
MLP. The MLP's wide hidden tensor exists for one chunk only, and stays in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING

import torch

from vitfast.layers import _attention
from vitfast.layers._norm import Norm
from vitfast.ops import _gemm, _onednn
from vitfast.ops import _norm as norm_op
from vitfast.ops.attention import native as attention_op
from vitfast.ops.window_attention import native as window_op
from vitfast.runtime import native
from vitfast.runtime.library import autocast_dtype
from vitfast.settings import settings

if TYPE_CHECKING:
    from vitfast.layers._attention import Attention, Windows
    from vitfast.layers._block import Block
    from vitfast.layers._guard import Linear

CHUNK_ROWS = 1024
WHOLE_ROWS = 2048
"""Up to so many rows go through as one chunk."""
MOST_HEAD_DIM = 256
"""The attention kernel's limit."""
_DTYPES = frozenset(norm_op.DTYPES)


def block(
    x: torch.Tensor,
    plan: Block,
    *,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    rope: torch.Tensor | None = None,
    is_causal: bool = False,
    windows: Windows | None = None,
) -> torch.Tensor | None:
    """The block on x [B, N, C], or None where it takes the public ops to compute or to complain.

    The result has the dtype that the residual stream has in timm.
    """
    lower = autocast_dtype(x.device)
    operand = lower or x.dtype
    stream = _stream_dtype(x, plan, operand)
    if stream is None or not _fits(x, plan, lower, mask, bias, rope):
        return None
    batch, tokens, channels = x.shape
    x = x.reshape(-1, channels)
    chunks = _chunks(len(x))
    normed = _gemm.empty((chunks[0].stop, channels), operand)

    qkv = _projected(x, plan, operand, chunks, normed)
    qkv = _attention.split_heads([t.unflatten(0, (batch, tokens)) for t in qkv], plan.attn)
    if windows is None:
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
    else:
        attended, _ = window_op.forward(
            qkv[0].unflatten(1, windows.size), windows.window, windows.shift, plan.attn.table,
            _attention.padding(plan.attn, windows, qkv[0]), None, None, True, False,
        )  # fmt: skip
    out = _gemm.empty(x.shape, stream)
    _finish(x, attended.view(len(x), -1), plan, operand, chunks, normed, out)
    return out.view(batch, tokens, channels)


def _projected(
    x: torch.Tensor, plan: Block, operand: torch.dtype, chunks: list[slice], normed: torch.Tensor
) -> list[torch.Tensor]:
    """norm1 and the projection(s) to q, k and v: [rows, 3 A], or three of [rows, A]."""
    layers = [_linear(linear, len(x), operand) for linear in plan.attn.qkv]
    if len(chunks) == 1:
        part = _normalise(x, plan.norm1, normed)
        return [layer(part) for layer in layers]
    sizes = [linear.weight.shape[0] for linear in plan.attn.qkv]
    results = [_gemm.empty((len(x), size), operand) for size in sizes]
    for chunk in chunks:
        rows = x[chunk]
        part = _normalise(rows, plan.norm1, normed[: len(rows)])
        for layer, result in zip(layers, results, strict=True):
            result[chunk] = layer(part)
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
    mlp, norm2 = plan.mlp, plan.norm2
    proj = _linear(plan.attn.proj, len(x), operand)
    fc1 = _linear(mlp.fc1, len(x), operand, mlp.act, mlp.packed, mlp.gate)
    fc2 = _linear(mlp.fc2, len(x), operand)
    for chunk in chunks:
        part, stream = attended[chunk], out[chunk]
        if plan.attn.norm is not None:
            part = _normalise(part, plan.attn.norm, part)
        part = norm_op.forward(
            norm_op.KINDS[norm2.kind],
            x[chunk],
            branch=proj(part),
            gamma=plan.gamma1,
            weight=norm2.weight,
            bias=norm2.bias,
            eps=norm2.eps,
            residual_out=stream,
            normed_out=normed[: len(stream)],
        )[1]
        hidden = fc1(part)
        if mlp.norm is not None:
            hidden = _normalise(hidden, mlp.norm, hidden)
        norm_op.forward(
            norm_op.NONE, stream, branch=fc2(hidden), gamma=plan.gamma2, residual_out=stream
        )


def _linear(
    linear: Linear,
    rows: int,
    dtype: torch.dtype,
    act: str = "none",
    packed: str | None = None,
    gate: Linear | None = None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The faster of oneDNN and our own kernel, which has every activation and gate."""
    if packed is None and gate is None and not _onednn.reasons(*linear, dtype, act):
        return _onednn.prepare(*linear, rows, dtype, act)
    gate_weight, gate_bias = gate or (None, None)
    layer = _gemm.prepare(
        *linear, rows, dtype, gate=packed, gate_weight=gate_weight, gate_bias=gate_bias
    )
    return partial(_gemm.apply, layer, act=act)


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
    lower: torch.dtype | None,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    rope: torch.Tensor | None,
) -> bool:
    """Whether dtypes, devices and sizes are those the kernels take unchecked."""
    if settings.backend not in ("auto", "cpu") or native.reasons():
        return False
    if not x.is_cpu or x.ndim != 3 or not x.numel() or not {x.dtype, lower or x.dtype} <= _DTYPES:
        return False
    attn, mlp = plan.attn, plan.mlp
    batch, tokens, channels = x.shape
    width, hidden = attn.proj.weight.shape[-1], mlp.fc2.weight.shape[-1]
    dim, shared = width // attn.heads, width // attn.kv_groups
    sizes = (width, shared, shared) if len(attn.qkv) == 3 else (3 * width,)
    linears = [
        (attn.proj, channels, width),
        (mlp.fc1, 2 * hidden if mlp.packed else hidden, channels),
        (mlp.fc2, channels, hidden),
        *((linear, size, channels) for linear, size in zip(attn.qkv, sizes, strict=True)),
    ]
    if mlp.gate is not None:
        linears.append((mlp.gate, hidden, channels))
    # Without autocast timm wants one dtype, and it is for the ops to complain.
    dtypes = norm_op.DTYPES if lower else (x.dtype,)
    for (weight, offset), rows, columns in linears:
        if not _tensor(weight, (rows, columns), dtypes) or not _vector(offset, rows, dtypes):
            return False
    for norm, size in (
        (plan.norm1, channels),
        (plan.norm2, channels),
        (attn.norm, width),
        (mlp.norm, hidden),
        (attn.q_norm, dim),
        (attn.k_norm, dim),
    ):
        if norm is not None and not (_vector(norm.weight, size) and _vector(norm.bias, size)):
            return False
    return (
        dim * attn.heads == width
        and dim <= MOST_HEAD_DIM
        and (attn.table is None or attn.table.dtype in norm_op.DTYPES and attn.table.is_cpu)
        and _vector(plan.gamma1, channels)
        and _vector(plan.gamma2, channels)
        and _addend(mask)
        and _addend(bias)
        and (rope is None or _rope(rope, attn, batch, tokens, dim))
    )


def _tensor(t: torch.Tensor, shape: tuple[int, ...], dtypes: Collection[torch.dtype]) -> bool:
    return t.shape == shape and t.dtype in dtypes and t.is_cpu


def _vector(
    t: torch.Tensor | None, size: int, dtypes: Collection[torch.dtype] = norm_op.DTYPES
) -> bool:
    return t is None or _tensor(t, (size,), dtypes)


def _addend(t: torch.Tensor | None) -> bool:
    """A mask or bias; its shape is checked where it is broadcast."""
    return t is None or ((t.dtype == torch.bool or t.dtype in norm_op.DTYPES) and t.is_cpu)


def _rope(rope: torch.Tensor, attn: Attention, batch: int, tokens: int, dim: int) -> bool:
    """As `ops.attention` wants it: [N', 2D], [H, N', 2D] or [B|1, H|1, N', 2D]."""
    most = (batch, attn.heads)[4 - rope.ndim :]
    return (
        rope.ndim in (2, 3, 4)
        and rope.shape[-2:] == (tokens - attn.prefix, 2 * dim)
        and dim % 2 == 0
        and all(n in (1, m) for n, m in zip(rope.shape, most, strict=False))
        and rope.is_cpu
        and rope.dtype in norm_op.DTYPES
    )
