"""Attention on the kernels of csrc/cpu/attention_forward.cpp and attention_backward.cpp."""

from __future__ import annotations

from typing import Any

import torch

from vitfast.ops.attention.reference import INPUTS, Call, wants_gradient
from vitfast.runtime.dispatch import Backend
from vitfast.runtime.native import DTYPE_CODES, address, native, reasons, threads

_NORMS = {"": 0, "layer": 1, "rms": 2}
_MASK_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.bool: 3}
_MAX_HEAD_DIM = 256
"""What the extension takes at most (csrc/bindings/attention.cpp). Chosen, not measured yet."""


def can_run(call: Call) -> list[str]:
    why = reasons()
    q = call.q
    if q.device.type != "cpu":
        why.append(f"q is on {q.device}; the kernels run on the CPU")
    if q.dtype not in (torch.float32, torch.bfloat16):
        why.append(f"q has dtype {q.dtype}; the kernels take float32 and bfloat16")
    if q.shape[-1] > _MAX_HEAD_DIM:
        why.append(f"head dim {q.shape[-1]} is above {_MAX_HEAD_DIM}")
    if call.mask_grad:
        why.append("mask requires grad; the kernels have a gradient for bias only")
    if call.rope_grad:
        why.append("rope requires grad; the kernels have no gradient for it")
    if call.rope is not None and call.rope.dtype == torch.float64:
        why.append("rope is float64; the kernels turn by float32 angles")
    return why


def forward_direct(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    is_causal: bool = False,
    qk_norm: str | None = None,
    q_norm_weight: torch.Tensor | None = None,
    q_norm_bias: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    k_norm_bias: torch.Tensor | None = None,
    qk_norm_eps: float = 1e-6,
    rope: torch.Tensor | None = None,
    rope_prefix: int = 0,
    rope_half: bool = False,
    out: torch.Tensor | None = None,
    stats: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernel without the op around it, for layers in inference that checked their inputs once.

    Takes what `vitfast.ops.attention` takes, unpacked and where `can_run` has no reason against.
    Not recorded by autograd, invisible to torch.compile.

    Args:
        out: [B, Nq, H, D], dtype of q, any strides: written and returned; else a new tensor.
        stats: [2, B, H, Nq], float32, contiguous: gets what the backward needs, see attention.h.
    """
    call = Call(
        q, k, v, mask, bias, is_causal, scale, qk_norm or "", q_norm_weight, q_norm_bias,
        k_norm_weight, k_norm_bias, qk_norm_eps, rope, rope_prefix, rope_half,
    )  # fmt: skip
    return forward_into(call, q.new_empty(q.shape) if out is None else out, stats)


def forward_into(call: Call, out: torch.Tensor, stats: torch.Tensor | None) -> torch.Tensor:
    """Writes out and stats, see `forward_direct`, and returns out."""
    q, k, v = call.split()
    if out.numel() == 0 or k.shape[1] == 0:
        return out.zero_()
    keep: list[torch.Tensor] = []  # converted tensors have to outlive the call
    native().attention_forward(
        _problem(keep, call, q, k, v), _prologue(keep, call), _view(out), address(stats), threads()
    )
    return out


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    q = call.split()[0]
    batch, queries, heads, _ = q.shape
    stats = q.new_empty((2, batch, heads, queries) if call.save_stats else 0, dtype=torch.float32)
    return forward_into(call, q.new_empty(q.shape), stats if call.save_stats else None), stats


def backward(
    grad: torch.Tensor, call: Call, out: torch.Tensor, stats: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    if stats[1, 0, 0, 0] < 0:
        # The forward ran on another backend (settings changed in between): nothing was saved.
        out, stats = forward(call)
    q = call.q
    grads = {n: q.new_empty(0) for n in INPUTS}
    names = ("q",) if call.k is None else ("q", "k", "v")
    written = {n: q.new_empty(getattr(call, n).shape) for n in names}
    grads |= written
    sums = backward_into(grad, call, out, stats, written)
    grads |= {n: total.to(getattr(call, n).dtype) for n, total in sums.items()}
    return tuple(grads.values())


def backward_into(
    grad: torch.Tensor,
    call: Call,
    out: torch.Tensor,
    stats: torch.Tensor,
    written: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The gradients of a call whose forward left out and stats, see `forward_direct`.

    Args:
        written: by name, the tensors like q, k and v, or like a packed q, of any strides, that get
            their gradients.

    Returns:
        By name the gradients that are sums over tokens or the batch, float32: of the bias, and of
        the norms' weights and biases.
    """
    q, k, v = call.split()
    dq, dk, dv = written["q"].unbind(2) if call.k is None else (written[n] for n in "qkv")
    affine = [n for n in INPUTS if "_norm_" in n]
    sums = {
        name: q.new_empty(getattr(call, name).shape, dtype=torch.float32)
        for name in ("bias", *affine)
        if wants_gradient(call, name)
    }
    keep: list[torch.Tensor] = []
    native().attention_backward(
        _problem(keep, call, q, k, v),
        _prologue(keep, call),
        _view(out),
        address(stats),
        _view(grad),
        _view(dq),
        _view(dk),
        _view(dv),
        address(sums.get("bias")),
        tuple(address(sums.get(n)) for n in affine),
        threads(),
    )
    return sums


def _problem(
    keep: list[torch.Tensor], call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[Any, ...]:
    """What is computed, as the extension takes it; q, k and v are the call's, `split`.

    Args:
        keep: gets what must live as long as the kernel runs.
    """
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    size = (batch, heads, queries, keys)
    return (
        DTYPE_CODES[q.dtype],
        (batch, heads, queries, keys, dim),
        call.scale,
        call.is_causal,
        _view(q),
        _view(k),
        _view(v),
        _addend(keep, call.mask, size),
        _addend(keep, call.bias, size),
    )


def _view(t: torch.Tensor) -> tuple[Any, ...]:
    """Address and element strides of a [B, N, H, D] tensor."""
    return (address(t), *t.stride())


def _addend(
    keep: list[torch.Tensor], t: torch.Tensor | None, size: tuple[int, int, int, int]
) -> tuple[Any, ...] | None:
    """Address, dtype and strides of a mask or bias, broadcast to [B, H, Nq, Nk] by strides of 0."""
    if t is None:
        return None
    if t.dtype not in _MASK_CODES:
        t = t.float()
    keep.append(t)
    return (address(t), _MASK_CODES[t.dtype], *t.expand(size).stride())


def _prologue(keep: list[torch.Tensor], call: Call) -> tuple[Any, ...] | None:
    """What happens to q and k on their way in, as the extension takes it; None for nothing."""
    rope = call.rope
    if not call.qk_norm and rope is None:
        return None
    weights = (call.q_norm_weight, call.q_norm_bias, call.k_norm_weight, call.k_norm_bias)
    affine = tuple(address(_float32(keep, t)) for t in weights)
    if rope is None:
        return (_NORMS[call.qk_norm], call.qk_norm_eps, affine, 0, (0, 0, 0), 0, False)
    rope = rope.float()
    if rope.stride(-1) != 1:
        rope = rope.contiguous()
    keep.append(rope)
    # [N', 2D], [H, N', 2D] and [B, H, N', 2D]: what is missing or 1 has a stride of 0.
    strides = [0 if n == 1 else s for n, s in zip(rope.shape[:-1], rope.stride(), strict=False)]
    strides = [0] * (3 - len(strides)) + strides
    return (
        _NORMS[call.qk_norm], call.qk_norm_eps, affine, address(rope), strides, call.rope_prefix,
        call.rope_half,
    )  # fmt: skip


def _float32(keep: list[torch.Tensor], t: torch.Tensor | None) -> torch.Tensor | None:
    if t is None:
        return None
    t = t.float().contiguous()
    keep.append(t)
    return t


BACKEND = Backend("cpu", forward, can_run, backward, reasons)
