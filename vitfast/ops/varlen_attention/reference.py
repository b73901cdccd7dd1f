"""Attention within packed sequences in plain PyTorch, one sequence after the other: the definition.

Each sequence is attended to alone, as `vitfast.ops.attention.reference` does it. Norms of q and k
and rotary embeddings work token by token, and so on all sequences at once.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from vitfast.errors import InputValueError
from vitfast.ops.attention import reference as attention_op
from vitfast.ops.attention.reference import Gradients

INPUTS = tuple(name for name in attention_op.INPUTS if name not in ("mask", "bias"))
"""Differentiable inputs, in the order of the outputs of `vitfast::varlen_attention_backward`."""
Span = tuple[int, int]
"""The first token of a sequence, and the first after it."""


class Call(NamedTuple):
    """The arguments of `vitfast::varlen_attention` before `backend`, in the order of its schema.

    Args:
        q, k, v, cu_seqlens, max_seqlen, is_causal, scale, and all from q_norm_weight to rope_half:
            as in `vitfast.ops.varlen_attention`.
        qk_norm: "layer", "rms", or "" for none.
        save_stats: whether the softmax statistics [2, H, total] are returned too, for the backward.
        rope_grad: whether the gradient of rope will be asked for.
    """

    q: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None
    cu_seqlens: torch.Tensor
    max_seqlen: int | None
    is_causal: bool
    scale: float | None
    qk_norm: str
    q_norm_weight: torch.Tensor | None
    q_norm_bias: torch.Tensor | None
    k_norm_weight: torch.Tensor | None
    k_norm_bias: torch.Tensor | None
    qk_norm_eps: float
    rope: torch.Tensor | None
    rope_half: bool
    save_stats: bool = False
    rope_grad: bool = False

    def whole(self) -> attention_op.Call:
        """All tokens as one sequence, for what works token by token."""
        q, k, v = (None if t is None else t[None] for t in self[:3])
        assert q is not None  # only k and v may be
        return attention_op.Call(
            q, k, v, None, None, self.is_causal, self.scale, self.qk_norm, self.q_norm_weight,
            self.q_norm_bias, self.k_norm_weight, self.k_norm_bias, self.qk_norm_eps, self.rope, 0,
            self.rope_half, self.save_stats, False, False, self.rope_grad,
        ).scaled()  # fmt: skip


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    *,
    max_seqlen: int | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    qk_norm: str | None = None,
    q_norm_weight: torch.Tensor | None = None,
    q_norm_bias: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    k_norm_bias: torch.Tensor | None = None,
    qk_norm_eps: float = 1e-6,
    rope: torch.Tensor | None = None,
    rope_half: bool = False,
) -> torch.Tensor:
    """Same arguments and result as `vitfast.ops.varlen_attention`; holds the scores of each
    sequence."""
    return compute(
        Call(
            q, k, v, cu_seqlens, max_seqlen, is_causal, scale, qk_norm or "", q_norm_weight,
            q_norm_bias, k_norm_weight, k_norm_bias, qk_norm_eps, rope, rope_half,
        )
    )  # fmt: skip


def offsets(call: Call) -> list[int]:
    """cu_seqlens as numbers, read where it lies: from a GPU this waits for it.

    Raises:
        InputValueError: it does not begin with 0, decreases, or does not end with the number of
            tokens; or a sequence is longer than max_seqlen.
    """
    found = call.cu_seqlens.tolist()
    total = call.q.shape[0]
    if found[0] != 0:
        raise InputValueError(f"varlen_attention: cu_seqlens begins with {found[0]}, expected 0")
    if found[-1] != total:
        raise InputValueError(
            f"varlen_attention: cu_seqlens ends with {found[-1]}, but q has {total} tokens"
        )
    lengths = [end - begin for begin, end in pairwise(found)]
    if any(length < 0 for length in lengths):
        where = next(i for i, length in enumerate(lengths) if length < 0)
        raise InputValueError(
            f"varlen_attention: cu_seqlens decreases from {found[where]} to {found[where + 1]}"
        )
    longest = max(lengths, default=0)
    if call.max_seqlen is not None and longest > call.max_seqlen:
        raise InputValueError(
            f"varlen_attention: max_seqlen is {call.max_seqlen}, but one sequence has {longest}"
            " tokens"
        )
    return found


def spans(call: Call) -> list[Span]:
    """The sequences that have tokens."""
    found = offsets(call)
    return [(b, e) for b, e in pairwise(found) if e > b]


def compute(call: Call) -> torch.Tensor:
    """out [total, H, D] by differentiable torch ops."""
    whole = call.whole()
    q, k, v = attention_op.prologue(whole)
    found = [
        attention_op.attend(whole, q[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end])[0]
        for begin, end in spans(call)
    ]
    out = torch.cat(found, 2) if found else q
    return out[0].transpose(0, 1).contiguous()


def backward(grad: torch.Tensor, call: Call) -> tuple[torch.Tensor, ...]:
    """Gradients for `INPUTS`, empty where not wanted, from that of the result [total, H, D]."""
    seed, whole = heads_first(grad), call.whole()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Gradients:
        found = [
            attention_op.attend_backward(
                seed[:, :, begin:end], whole, *(t[:, :, begin:end] for t in (q, k, v))
            )[:3]
            for begin, end in spans(call)
        ]
        dq, dk, dv = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
        return dq, dk, dv, None

    return of_packed(attention_op.differentiate(whole, attend))


def heads_first(t: torch.Tensor) -> torch.Tensor:
    """A packed [total, H, D] as [1, H, total, D]."""
    return t.transpose(0, 1)[None]


def of_packed(found: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Gradients for `INPUTS` from those of the call of `Call.whole`."""
    named = dict(zip(attention_op.INPUTS, found, strict=True))
    for name in ("q", "k", "v"):
        if named[name].ndim > 1:
            named[name] = named[name].squeeze(0)
    return tuple(named[name] for name in INPUTS)
