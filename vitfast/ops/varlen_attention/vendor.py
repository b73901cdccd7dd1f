"""Attention within packed sequences on torch's varlen attention, with the prologue in torch ops.

`torch.nn.attention.varlen.varlen_attn` runs FlashAttention on a GPU, or cuDNN's attention on some.
What its arguments are called has changed between versions of torch: here they are looked up by
name, and a version that lacks one is refused with that reason.

In inference `num_splits=1`, where torch knows it, keeps torch to FlashAttention and the bits of a
sequence apart from its neighbours. In training the choice is torch's own, the same in both passes.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from vitfast.ops.attention import reference as attention_op
from vitfast.ops.attention.reference import Gradients
from vitfast.ops.common.autodiff import gradients
from vitfast.ops.varlen_attention.reference import Call, heads_first, of_packed
from vitfast.runtime.dispatch import Backend

_DTYPES = (torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256


@functools.cache
def _torch() -> Any:
    """torch.nn.attention.varlen; None where torch has none."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    return varlen if hasattr(varlen, "varlen_attn") else None


@functools.cache
def _arguments() -> frozenset[str]:
    return frozenset(inspect.signature(_torch().varlen_attn).parameters)


def available() -> list[str]:
    if _torch() is None:
        return [f"torch {torch.__version__} has no varlen attention"]
    missing = {"cu_seq_q", "cu_seq_k", "max_q", "max_k", "scale"} - _arguments()
    if missing:
        return [f"torch {torch.__version__}'s varlen attention lacks {', '.join(sorted(missing))}"]
    return [] if torch.cuda.is_available() else ["torch sees no GPU"]


def can_run(call: Call) -> list[str]:
    q = call.q
    if q.device.type != "cuda":
        return [f"q is on {q.device}; torch's varlen attention runs on GPUs"]
    why = available()
    if q.dtype not in _DTYPES:
        why.append(f"q has dtype {q.dtype}; torch's varlen attention takes float16 and bfloat16")
    if q.shape[-1] % 8 or q.shape[-1] > _MAX_HEAD_DIM:
        why.append(f"head dim {q.shape[-1]} is no multiple of 8 up to {_MAX_HEAD_DIM}")
    if torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        why.append("torch's varlen attention needs compute capability 8.0")
    if call.is_causal and not _causal():
        why.append(f"torch {torch.__version__}'s varlen attention knows no causality")
    return why


def _causal() -> dict[str, Any]:
    """How the installed torch is asked for causality."""
    if "window_size" in _arguments():
        return {"window_size": (-1, 0)}
    return {"is_causal": True} if "is_causal" in _arguments() else {}


def _longest(call: Call) -> int:
    """Of the sequences; read from the GPU, which is waited for, where it was not given."""
    if call.max_seqlen is not None:
        return min(call.max_seqlen, call.q.shape[0])
    return int(call.cu_seqlens.diff().max()) if len(call.cu_seqlens) > 1 else 0


def _attend(
    call: Call, longest: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """out [total, H, D] of the same q, k and v after the prologue."""
    options: dict[str, Any] = _causal() if call.is_causal else {}
    if not call.save_stats and "num_splits" in _arguments():
        options["num_splits"] = 1
    where = call.cu_seqlens
    return _torch().varlen_attn(
        q, k, v, where, where, longest, longest, scale=call.whole().factor, **options
    )


def _rows(t: torch.Tensor) -> torch.Tensor:
    """[1, H, total, D] as [total, H, D], whose last stride is 1."""
    t = t[0].transpose(0, 1)
    return t if t.stride(-1) == 1 else t.contiguous()


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    rows = (_rows(t) for t in attention_op.prologue(call.whole()))
    out = _attend(call, _longest(call), *rows).contiguous()
    return out, no_stats(call, out)


def no_stats(call: Call, out: torch.Tensor) -> torch.Tensor:
    """Statistics [2, H, total] of a forward that leaves none, if any are asked for.

    -1 tells the backward of another backend so; on a GPU, where nobody can look without waiting,
    none reads them.
    """
    total, heads, _ = out.shape
    shape = (2, heads, total) if call.save_stats else (0,)
    return out.new_full(shape, -1.0, dtype=torch.promote_types(out.dtype, torch.float32))


def backward(
    grad: torch.Tensor, call: Call, out: torch.Tensor, stats: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Through torch's own autograd, after its forward once more: what its backward op is called,
    and what it takes, differs between versions, and with it what a forward has to keep."""
    longest = _longest(call)

    def attend(*operands: torch.Tensor) -> Gradients:
        dq, dk, dv = gradients(
            lambda *leaves: _attend(call, longest, *leaves), [_rows(t) for t in operands], (grad,)
        )
        return heads_first(dq), heads_first(dk), heads_first(dv), None

    return of_packed(attention_op.differentiate(call.whole(), attend))


BACKEND = Backend("vendor", forward, can_run, backward, available)
