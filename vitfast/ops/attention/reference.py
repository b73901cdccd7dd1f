"""Multi-head attention in plain PyTorch: the definition.

out = softmax(scale * q k^T + mask + bias) v (Vaswani et al. 2017), with q and k first normalised
over the head dim (Dehghani et al. 2023) and rotated (Su et al. 2021), as in timm's `Attention` and
`AttentionRope`. Scores and softmax are float32 (float64 for float64); what enters the second matrix
product has v's dtype, and so has what leaves the norm and the rotation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vitfast.ops.layer_norm.reference import layer_norm
from vitfast.ops.rms_norm.reference import rms_norm


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
    q, k, v = prologue(call)
    work = torch.promote_types(v.dtype, torch.float32)
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
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    out = (weights.to(v.dtype).to(work) @ v.to(work)).to(v.dtype)
    return out.transpose(1, 2).contiguous()


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
