"""Attention within packed sequences on the kernels of `vitfast.ops.attention`, on views.

Neighbours of the same length are one call of a kernel: a batch whose sequences follow each other
in memory. Nothing is copied, and a sequence's bits do not depend on those beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from vitfast.ops.attention import native as attention_op
from vitfast.ops.attention import reference as attention_reference
from vitfast.ops.attention.reference import wants_gradient
from vitfast.ops.varlen_attention.reference import INPUTS, Call, offsets
from vitfast.runtime.dispatch import Backend
from vitfast.runtime.native import reasons

Run = tuple[int, int, int]
"""Sequences of the same length that follow each other: first token, length, how many."""


def can_run(call: Call) -> list[str]:
    return attention_op.can_run(call.whole())


def runs(found: Sequence[int]) -> list[Run]:
    """The runs of sequences that have tokens, of cu_seqlens as numbers."""
    made: list[Run] = []
    for begin, end in pairwise(found):
        length = end - begin
        if made and length == made[-1][1]:
            first, _, count = made[-1]
            made[-1] = (first, length, count + 1)
        elif length:
            made.append((begin, length, 1))
    return made


def forward_direct(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    found: Sequence[int],
    *,
    scale: float,
    rope: torch.Tensor | None = None,
    out: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """The kernels without the op around them, for layers in inference that checked their inputs.

    Not recorded by autograd, invisible to torch.compile.

    Args:
        q, k, v: [total, H, D] of one dtype, any strides.
        found: cu_seqlens as numbers.
        rope: as in `vitfast.ops.varlen_attention`, and so are `options`, what is said there of
            q/k norm, causality and the layout of rope.
        out: [total, H, D], dtype of q: written and returned.
    """
    for run in runs(found):
        attention_op.forward_direct(
            *(batch_of(t, run) for t in (q, k, v)),
            scale=scale,
            rope=None if rope is None else _rope_of(rope, run),
            out=batch_of(out, run),
            **options,
        )
    return out


def batch_of(t: torch.Tensor, run: Run) -> torch.Tensor:
    """The tokens of a run out of [total, ...], a view [count, length, ...]."""
    begin, length, count = run
    return t[begin : begin + length * count].unflatten(0, (count, length))


def _rope_of(rope: torch.Tensor, run: Run) -> torch.Tensor:
    """[total, 2D] or [H, total, 2D] as a view [count, 1 or H, length, 2D]."""
    if rope.ndim == 2:
        return batch_of(rope, run).unsqueeze(1)
    return batch_of(rope.transpose(0, 1), run).transpose(1, 2)


def _batches(
    call: Call, stats: torch.Tensor, *packed: torch.Tensor
) -> Iterator[tuple[attention_reference.Call, torch.Tensor, list[torch.Tensor]]]:
    """By run, the attention of a batch that it is; its statistics [2, B, H, N]; and its tokens of
    further packed tensors."""
    whole, heads = call.whole(), call.q.shape[-2]
    flat = stats.view(-1)
    for run in runs(offsets(call)):
        begin, length, count = run
        q, k, v = (None if t is None else batch_of(t, run) for t in call[:3])
        assert q is not None  # only k and v may be
        rope = None if call.rope is None else _rope_of(call.rope, run)
        part = flat[2 * heads * begin : 2 * heads * (begin + length * count)]
        yield (
            whole._replace(q=q, k=k, v=v, rope=rope),
            part.view(2, count, heads, length) if stats.numel() else part,
            [batch_of(t, run) for t in packed],
        )


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    total, *_, heads, dim = call.q.shape
    out = call.q.new_empty(total, heads, dim)
    size = (2, heads, total) if call.save_stats else (0,)
    stats = call.q.new_empty(size, dtype=torch.float32)
    for batch, part, (result,) in _batches(call, stats, out):
        attention_op.forward_into(batch, result, part if call.save_stats else None)
    return out, stats


def backward(
    grad: torch.Tensor, call: Call, out: torch.Tensor, stats: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    if stats.view(-1)[-1] < 0:
        # The forward ran on another backend (settings changed in between): nothing was saved.
        out, stats = forward(call)
    q = call.q
    grads = {n: q.new_empty(0) for n in INPUTS}
    names = ["q"] if call.k is None else ["q", "k", "v"]
    grads |= {n: q.new_empty(getattr(call, n).shape) for n in names}
    affine = [n for n in INPUTS if "_norm_" in n and wants_gradient(call, n)]
    sums = {n: q.new_zeros(getattr(call, n).shape, dtype=torch.float32) for n in affine}
    packed = (grad, out, *(grads[n] for n in names))
    for batch, part, (seed, result, *into) in _batches(call, stats, *packed):
        found = attention_op.backward_into(
            seed, batch, result, part, dict(zip(names, into, strict=True))
        )
        for n in affine:
            sums[n] += found[n]
    grads |= {n: total.to(getattr(call, n).dtype) for n, total in sums.items()}
    return tuple(grads.values())


BACKEND = Backend("cpu", forward, can_run, backward, reasons)
