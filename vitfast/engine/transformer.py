"""The block in inference on the CPU: native kernels called directly, rows in cache-sized chunks.

Without autograd everything but the attention works row by row. So the rows go through in chunks: a
chunk's norm and qkv; after the attention its projection with LayerScale and residual, its norm, its
MLP. The MLP's wide hidden tensor exists for one chunk only, and stays in cache.
"""

from __future__ import annotations

import torch

from vitfast.engine import checks, memo
from vitfast.engine import rows as by_rows
from vitfast.engine.replay import is_recording
from vitfast.engine.steps import PreparedBlock, prepare_block
from vitfast.engine.windows import run_windowed
from vitfast.ops.attention import native as attention_op
from vitfast.ops.varlen_attention import native as varlen_op
from vitfast.plans import (
    Sequences,
    TransformerBlock,
    Windows,
    prologue,
    split_heads,
)
from vitfast.runtime import native


def block(
    x: torch.Tensor,
    plan: TransformerBlock,
    *,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    rope: torch.Tensor | None = None,
    is_causal: bool = False,
    windows: Windows | None = None,
    half: str = "",
) -> torch.Tensor | None:
    """The block on x [B, N, C], or None where it takes the public ops to compute or to complain.

    The result has the dtype that the residual stream has in timm.

    Args:
        half: "attention" or "mlp" for that half alone; the other need not have been read.
    """
    rows = by_rows.count(x)
    if half == "mlp":
        return memo.call(_mlp_half, prepare_block, rows, x, plan, None, half)
    if windows is not None:
        return memo.call(run_windowed, prepare_block, rows, x, plan, windows, half)
    if mask is None and bias is None:
        run = _causal if is_causal else _whole
        besides = () if rope is None else (rope,)
        if rope is None or (x.ndim == 3 and checks.terms(x, plan, mask, bias, rope)):
            return memo.call(run, prepare_block, rows, x, plan, None, half, besides=besides)
        return None
    steps = memo.recall(prepare_block, rows, x, plan, None, half)
    if steps is None or not checks.terms(x, plan, mask, bias, rope):
        return None
    return _whole(steps, x, rope, mask, bias, is_causal)


def packed_block(
    x: torch.Tensor, plan: TransformerBlock, sequences: Sequences, rope: torch.Tensor | None = None
) -> torch.Tensor | None:
    """The block on the rows x [1, total, C] of several sequences, or None as `block`.

    Nearly every batch of images of mixed sizes has another total. What is prepared for one works
    for any number of rows, so it is kept for the largest power of two in it, and not replayed.

    Args:
        rope: of all tokens, as `ops.varlen_attention` takes it.
    """
    if x.ndim != 3 or x.shape[0] != 1 or x.numel() == 0:
        return None
    like = x[:, :1].expand(1, 1 << (x.shape[1].bit_length() - 1), -1)
    steps = memo.recall(prepare_block, like.shape[1], like, plan, None, "")
    if steps is None:
        return None
    attn = plan.attn._replace(prefix=0)  # the prefixes lie among the rows
    if not checks.terms(x, plan._replace(attn=attn), None, None, rope):
        return None
    rows = x[0]
    qkv = split_heads(steps.project(rows), attn)
    q, k, v = qkv if len(qkv) == 3 else qkv[0].unbind(1)
    options = prologue(attn, rope)
    options.pop("rope_prefix", None)
    attended = varlen_op.forward_direct(
        q, k, v, sequences.offsets, scale=q.shape[-1] ** -0.5, out=_room(q), **options
    )
    del qkv, q, k, v  # as large as three maps
    out = native.empty(rows.shape, steps.stream)
    steps.finish(rows, attended.flatten(1), out)
    return out[None]


def _causal(
    steps: PreparedBlock, x: torch.Tensor, rope: torch.Tensor | None = None
) -> torch.Tensor:
    return _whole(steps, x, rope, is_causal=True)


def _whole(
    steps: PreparedBlock,
    x: torch.Tensor,
    rope: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    plan = steps.plan
    batch, tokens, channels = x.shape
    rows = x.reshape(-1, channels)
    qkv = [t.unflatten(0, (batch, tokens)) for t in steps.project(rows)]
    attended = _attend(split_heads(qkv, plan.attn), plan, mask, bias, rope, is_causal)
    del qkv  # as large as three maps
    out = steps.room(x)
    steps.finish(rows, attended.flatten(2).flatten(0, 1), out.view(rows.shape))
    return out


def _attend(
    qkv: list[torch.Tensor],
    plan: TransformerBlock,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    rope: torch.Tensor | None,
    is_causal: bool,
) -> torch.Tensor:
    q, k, v = qkv if len(qkv) == 3 else qkv[0].unbind(2)
    return attention_op.forward_direct(
        q,
        k,
        v,
        scale=q.shape[-1] ** -0.5,
        mask=mask,
        bias=bias,
        is_causal=is_causal,
        out=_room(q),
        **prologue(plan.attn, rope),
    )


def _room(q: torch.Tensor) -> torch.Tensor:
    """Where attention writes its result: in place of a large q, each element of which is read for
    one block of queries of one head, before that block is written; else new memory.

    Returns:
        q's shape [..., H, D], whose last two dimensions can be flattened without a copy.
    """
    in_rows = q.stride()[-2:] == (q.shape[-1], 1)
    if in_rows and q.nbytes >= native.LARGE and not is_recording():
        return q
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _mlp_half(steps: PreparedBlock, x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = native.empty(rows.shape, steps.stream)
    for part, result in by_rows.in_chunks(rows, out):
        steps.mlp_half(part, result)
    return out.view(x.shape)
