"""The block in inference on the CPU: native kernels called directly, rows in cache-sized chunks.

Without autograd everything but the attention works row by row. So the rows go through in chunks: a
chunk's norm and qkv; after the attention its projection with LayerScale and residual, its norm, its
MLP. The MLP's wide hidden tensor exists for one chunk only, and stays in cache.
"""

from __future__ import annotations

import torch

from vitfast.engine import checks, memo
from vitfast.engine import rows as by_rows
from vitfast.engine.steps import PreparedBlock, prepare_block
from vitfast.engine.windows import run_windowed
from vitfast.ops.attention import native as attention_op
from vitfast.plans import (
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
    out = native.empty(rows.shape, steps.stream)
    steps.finish(rows, attended.view(len(rows), -1), out)
    return out.view(batch, tokens, channels)


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
        out=torch.empty(q.shape, dtype=q.dtype, device=q.device),
        **prologue(plan.attn, rope),
    )


def _mlp_half(steps: PreparedBlock, x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = native.empty(rows.shape, steps.stream)
    for part, result in by_rows.in_chunks(rows, out):
        steps.mlp_half(part, result)
    return out.view(x.shape)
