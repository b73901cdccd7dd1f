"""Multi-head attention in plain PyTorch: the definition.

out = softmax(scale * q k^T + mask + bias) v (Vaswani et al. 2017), with q and k first normalised
over the head dim (Dehghani et al. 2023) and rotated (Su et al. 2021), as in timm's `Attention` and
`AttentionRope`. Scores and softmax are float32 (float64 for float64); what enters the second matrix
product has v's dtype, and so has what leaves the norm and the rotation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from vitfast.ops.common.autodiff import gradients
from vitfast.ops.layer_norm.reference import layer_norm
from vitfast.ops.rms_norm.reference import rms_norm

INPUTS = (
    "q",
    "k",
    "v",
    "mask",
    "bias",
    "q_norm_weight",
    "q_norm_bias",
    "k_norm_weight",
    "k_norm_bias",
    "rope",
)
"""Differentiable inputs, in the order of the outputs of `vitfast::attention_backward`."""
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"]
"""Of q, k and v [B, H, N, D] after the prologue, and of the scores [B, H, Nq, Nk] before softmax;
None where nothing that is added to them has a gradient."""


class Call(NamedTuple):
    """The arguments of `vitfast::attention` before `backend`, in the order of its schema.

    Args:
        q, k, v, mask, bias, is_causal, scale, and all from q_norm_weight to rope_half: as in
            `vitfast.ops.attention`.
        qk_norm: "layer", "rms", or "" for none.
        save_stats: whether the softmax statistics [2, B, H, Nq] are returned too, for the backward.
        mask_grad, bias_grad, rope_grad: whether the gradient of that tensor will be asked for.
    """

    q: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None
    mask: torch.Tensor | None
    bias: torch.Tensor | None
    is_causal: bool
    scale: float | None
    qk_norm: str
    q_norm_weight: torch.Tensor | None
    q_norm_bias: torch.Tensor | None
    k_norm_weight: torch.Tensor | None
    k_norm_bias: torch.Tensor | None
    qk_norm_eps: float
    rope: torch.Tensor | None
    rope_prefix: int
    rope_half: bool
    save_stats: bool = False
    mask_grad: bool = False
    bias_grad: bool = False
    rope_grad: bool = False

    def split(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [B, Nq, H, D] and k, v [B, Nk, H, D], views of the packed tensor where it is one."""
        if self.k is None or self.v is None:
            q, k, v = self.q.unbind(2)
            return q, k, v
        return self.q, self.k, self.v

    @property
    def factor(self) -> float:
        """The factor of the scores."""
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale

    def scaled(self) -> Call:
        """The same call with the default scale filled in: one number, symbolic until it runs."""
        return self if self.scale is not None else self._replace(scale=self.factor)


def attention(
    q: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    qk_norm: str | None = None,
    q_norm_weight: torch.Tensor | None = None,
    q_norm_bias: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    k_norm_bias: torch.Tensor | None = None,
    qk_norm_eps: float = 1e-6,
    rope: torch.Tensor | None = None,
    rope_prefix: int = 0,
    rope_half: bool = False,
) -> torch.Tensor:
    """Same arguments and result as `vitfast.ops.attention`; holds the [B, H, Nq, Nk] scores."""
    call = Call(
        q, k, v, mask, bias, is_causal, scale, qk_norm or "", q_norm_weight, q_norm_bias,
        k_norm_weight, k_norm_bias, qk_norm_eps, rope, rope_prefix, rope_half,
    )  # fmt: skip
    return compute(call.scaled())


def compute(call: Call) -> torch.Tensor:
    """out [B, Nq, H, D] by differentiable torch ops; holds the [B, H, Nq, Nk] scores."""
    out, _ = attend(call, *prologue(call))
    return out.transpose(1, 2).contiguous()


def attend(
    call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, with_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What follows the prologue: out [B, H, Nq, D] from its results.

    Args:
        with_lse: give each row's log-sum-exp of the scores, too, [B, H, Nq]; infinity for a query
            that sees no key.
    """
    scores, blind = _scores(call, q, k)
    weights = _weights(scores, blind)
    out = (weights.to(v.dtype).to(weights.dtype) @ v.to(weights.dtype)).to(v.dtype)
    if not with_lse:
        return out, None
    return out, scores.logsumexp(-1).masked_fill(blind[..., 0], float("inf"))


def attend_backward(
    grad: torch.Tensor, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Gradients:
    """The backward of `attend`, from the gradient of its result.

    Needs nothing that a forward saved: the scores are made again, which is one matrix product
    beside the four of the gradients, rather than kept, which is Nk numbers a query and head.
    """
    weights = _weights(*_scores(call, q, k))
    work = weights.dtype
    grad = grad.to(work)
    dv = weights.to(v.dtype).to(work).mT @ grad
    dscores = grad @ v.to(work).mT
    dscores -= (weights * dscores).sum(-1, keepdim=True)
    dscores *= weights
    dq = dscores @ k.to(work) * call.factor
    dk = dscores.mT @ q.to(work) * call.factor
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dscores


def backward(grad: torch.Tensor, call: Call) -> tuple[torch.Tensor, ...]:
    """Gradients for `INPUTS`, empty where not wanted, from that of the result [B, Nq, H, D]."""
    grad = grad.transpose(1, 2)
    return differentiate(call, lambda q, k, v: attend_backward(grad, call, q, k, v))


def _scores(call: Call, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, H, Nq, Nk] with mask, bias and causality; [B, H, Nq, 1] of True where all are -inf."""
    work = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(work) @ k.to(work).mT) * call.factor
    if call.mask is not None:
        if call.mask.dtype == torch.bool:
            scores = scores.masked_fill(~call.mask, float("-inf"))
        else:
            scores = scores + call.mask.to(work)
    if call.bias is not None:
        scores = scores + call.bias.to(work)
    if call.is_causal:
        scores = scores.masked_fill(~causal_keep(q, k), float("-inf"))
    return scores, (scores == float("-inf")).all(-1, keepdim=True)


def _weights(scores: torch.Tensor, blind: torch.Tensor) -> torch.Tensor:
    """softmax of the scores, 0 for a query that sees no key."""
    return scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)


# ---- gradients -----------------------------------------------------------------------------------


def wants_gradient(call: tuple[Any, ...], name: str) -> bool:
    """Whether the backward op computes the gradient of this input of a call record."""
    return getattr(call, name) is not None and getattr(call, f"{name}_grad", True)


def unwritten_gradients(call: Any, names: Sequence[str]) -> tuple[torch.Tensor, ...]:
    """For each input of a call record a contiguous tensor like it, its elements not set, where its
    gradient is wanted; else an empty one, of the dtype and device of q."""
    return tuple(
        torch.empty_like(getattr(call, n), memory_format=torch.contiguous_format)
        if wants_gradient(call, n)
        else call.q.new_empty(0)
        for n in names
    )


def differentiate(call: Call, attend: Callable[..., Gradients]) -> tuple[torch.Tensor, ...]:
    """Gradients for `INPUTS`, empty where not wanted, from those of what `prologue` gives.

    Args:
        attend: takes the results of `prologue`, gives their gradients; called once.
    """
    found: dict[str, torch.Tensor] = {}

    def run(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *grads, dscores = attend(*operands)
        for name, t in (("mask", call.mask), ("bias", call.bias)):
            if t is not None and dscores is not None and wants_gradient(call, name):
                found[name] = dscores.sum_to_size(t.shape).to(t.dtype).contiguous()
        return tuple(grads)

    if not call.qk_norm and call.rope is None:
        dq, dk, dv = (t.transpose(1, 2) for t in run(*prologue(call)))
        if call.k is None:
            found["q"] = torch.stack((dq, dk, dv), 2)
        else:
            found |= {"q": dq.contiguous(), "k": dk.contiguous(), "v": dv.contiguous()}
    else:
        names = [n for n in INPUTS if n not in ("mask", "bias") and wants_gradient(call, n)]
        through = gradients(
            lambda *leaves: prologue(call._replace(**dict(zip(names, leaves, strict=True)))),
            [getattr(call, n) for n in names],
            run,
        )
        found |= dict(zip(names, through, strict=True))
    return tuple(found[n] if n in found else call.q.new_empty(0) for n in INPUTS)


# ---- q, k and v ----------------------------------------------------------------------------------


def causal_keep(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[Nq, Nk] of True where key j <= query i: both sequences start together, as in SDPA."""
    size = (q.shape[-2], k.shape[-2])
    return torch.ones(size, dtype=torch.bool, device=q.device).tril()


def prologue(call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k (normalised and rotated) and v as [B, H, N, D]."""
    q, k, v = call.split()
    q = _norm(q, call.qk_norm, call.q_norm_weight, call.q_norm_bias, call.qk_norm_eps)
    k = _norm(k, call.qk_norm, call.k_norm_weight, call.k_norm_bias, call.qk_norm_eps)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if call.rope is not None:
        q = _rotate(q, call.rope, call.rope_prefix, call.rope_half).to(v.dtype)
        k = _rotate(k, call.rope, call.rope_prefix, call.rope_half).to(v.dtype)
    return q, k, v


def _norm(
    x: torch.Tensor,
    kind: str,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """x [B, N, H, D] normalised over D; kind as `Call.qk_norm`."""
    if kind == "layer":
        return layer_norm(x, weight, bias, eps)
    if kind == "rms":
        return rms_norm(x, weight, eps)
    return x


def _rotate(x: torch.Tensor, rope: torch.Tensor, prefix: int, half: bool) -> torch.Tensor:
    """timm `apply_rot_embed_cat` on the tokens after the prefix of x [B, H, N, D]."""
    sin, cos = rope.chunk(2, -1)
    tail = x[:, :, prefix:]
    if half:
        first, second = tail.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else:
        turned = torch.stack([-tail[..., 1::2], tail[..., ::2]], -1).flatten(-2)
    return torch.cat([x[:, :, :prefix], (tail * cos + turned * sin).to(x.dtype)], 2)
