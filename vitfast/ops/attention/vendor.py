"""Attention on torch's scaled_dot_product_attention, with the prologue in torch ops."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitfast.ops.attention import fused, reference
from vitfast.ops.attention.fused import Problem
from vitfast.ops.attention.reference import (
    Call,
    Gradients,
    causal_keep,
    differentiate,
    prologue,
)
from vitfast.ops.common.autodiff import gradients
from vitfast.runtime.dispatch import Backend
from vitfast.runtime.launches import arch_of, choice_of, choose_anew


def compute(call: Call) -> torch.Tensor:
    """out [B, Nq, H, D] by differentiable torch ops."""
    out = _sdpa(_problem(call, *prologue(call)), kernel(call))
    return out.to(call.q.dtype).transpose(1, 2).contiguous()


def _problem(call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Problem:
    """What SDPA is asked, of q, k and v after the prologue."""
    mask = _merged_mask(call, q, k)
    if q.device.type == "cuda" and mask is not None and mask.dtype not in (torch.bool, q.dtype):
        # The memory-efficient kernel wants one dtype, and rounding the mask would be felt.
        q, k, v = (t.to(mask.dtype) for t in (q, k, v))
    is_causal = call.is_causal and mask is None
    return Problem(q, k, v, mask, is_causal, call.factor, call.mask_grad or call.bias_grad)


def _sdpa(problem: Problem, chosen: str) -> torch.Tensor:
    """[B, H, Nq, D] by differentiable torch ops; chosen: as `kernel` says."""
    q, k, v, mask, is_causal, scale, _ = problem
    if chosen == "xformers" and not is_causal:
        return _xformers(q, k, v, scale)
    with _choosing(chosen):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale
        )


KERNELS = {
    "cudnn": "CUDNN_ATTENTION",
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
}
"""Kernels of torch's SDPA by the names of `vitfast`'s tables."""
UNMASKED = (*KERNELS, "xformers")
"""Those that `vitfast tune` chooses from."""
_USUAL = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


def kernel(call: Call) -> str:
    """Which vendor kernel serves a call on a GPU; "" leaves it to torch.

    With a mask or bias never cuDNN: its backward gives NaN at some lengths (pytorch#196678), and
    it misreads a float32 mask beside half-precision q, k and v (pytorch#191612). Without: what the
    device's table says was fastest, and torch's own order where there is no table.
    """
    q = call.q
    if q.device.type != "cuda" or torch.compiler.is_compiling():
        return ""
    if call.mask is not None or call.bias is not None:
        return "masked"
    if _forced:
        return _forced[-1]
    return choice_of("attention.vendor", arch_of(q.device), key_of(q, call.save_stats))


def key_of(q: torch.Tensor, train: bool) -> dict[str, int | str]:
    """What the fastest kernel depends on; q is [B, N, H, D] or packed [B, N, 3, H, D]."""
    return {
        "dtype": str(q.dtype).removeprefix("torch."),
        "pass": "train" if train else "infer",
        "head_dim": q.shape[-1],
        "tokens": q.shape[1],
    }


_forced: list[str] = []


@contextlib.contextmanager
def forcing(name: str) -> Iterator[None]:
    """Within, unmasked calls on GPUs run this vendor kernel: for `vitfast tune` and `bench`."""
    _forced.append(name)
    choose_anew()
    try:
        yield
    finally:
        _forced.pop()
        choose_anew()


def _choosing(chosen: str) -> contextlib.AbstractContextManager[None]:
    """Within, SDPA runs this kernel; unless it is `forcing`, another where that one cannot.

    A table's pick is that of the nearest problem, and may not take this one.
    """
    if not chosen:
        return contextlib.nullcontext()
    if _forced and chosen in KERNELS:
        return sdpa_kernel([getattr(SDPBackend, KERNELS[chosen])])
    first = [KERNELS[chosen]] if chosen in KERNELS else []
    names = dict.fromkeys((*first, *_USUAL))
    return sdpa_kernel([getattr(SDPBackend, n) for n in names], set_priority=bool(first))


def _xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """xformers' attention, which takes [B, N, H, D]; these are [B, H, N, D]."""
    from xformers.ops import memory_efficient_attention

    out = memory_efficient_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale)
    return out.transpose(1, 2)


def _merged_mask(call: Call, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """Mask, bias and causality as the one attn_mask that SDPA takes; None without the first two.

    A float mask keeps its precision: SDPA takes float32 beside a lower-precision q, and rounding
    float32's most negative number to bfloat16 would turn it into -inf.
    """
    given = [torch.atleast_2d(t) for t in (call.mask, call.bias) if t is not None]
    keep = [t for t in given if t.dtype == torch.bool]
    terms = [t for t in given if t.dtype != torch.bool]
    if not given:
        return None
    if call.is_causal:
        keep.append(causal_keep(q, k))
    seen = keep[0] & keep[1] if len(keep) == 2 else keep[0] if keep else None
    if not terms:
        return seen
    if len(terms) == 2 or terms[0].dtype != q.dtype:
        terms = [t.to(torch.promote_types(q.dtype, torch.float32)) for t in terms]
    total = terms[0] + terms[1] if len(terms) == 2 else terms[0]
    return total if seen is None else total.masked_fill(~seen, float("-inf"))


def can_run(call: Call) -> list[str]:
    masked = call.mask is not None and call.mask.dtype != torch.bool
    # torch's own softmax, which serves calls with a mask gradient on the CPU, keeps the weights.
    keeps_weights = call.q.device.type == "cpu" and (call.mask_grad or call.bias_grad)
    if call.save_stats and masked and not keeps_weights:
        # The log-sum-exp of a row masked by finfo.min (NaFlexViT) cannot tell one key from many,
        # and the backward then weighs every key by 1.
        return ["a float mask: SDPA's fused backward is wrong where the mask drowns the scores"]
    return []


def no_stats(call: Call, out: torch.Tensor) -> torch.Tensor:
    """Statistics of a forward that leaves none.

    Sums of -1 tell the backward of another backend so; on a GPU, where nobody can look without
    waiting, NaN spoils its gradients for all to see.
    """
    batch, queries, heads, _ = out.shape
    shape = (2, batch, heads, queries) if call.save_stats else (0,)
    missing = float("nan") if out.device.type == "cuda" else -1.0
    return out.new_full(shape, missing, dtype=torch.promote_types(out.dtype, torch.float32))


_LSE_ONLY = -2.0
"""Stands for the sums where the shifts are log-sum-exps: negative, as other backends know it."""


def _stats_of(call: Call, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Statistics that hold a log-sum-exp [B, H, Nq], and spoil another backend as `no_stats`."""
    stats = no_stats(call, out)
    stats[0] = lse
    if stats.device.type != "cuda":
        stats[1] = _LSE_ONLY
    return stats


def _lse_of(call: Call, stats: torch.Tensor) -> torch.Tensor | None:
    """The log-sum-exp [B, H, Nq] that `_stats_of` put there, or that another backend's tell.

    On the CPU None where another backend ran. On a GPU, where nobody can look without waiting, it
    follows from the shifts and sums of Triton's kernels; it is NaN where a backend left none.
    """
    if stats.device.type == "cuda":
        return torch.where(stats[1].isnan(), stats[0], lse_of_sums(call, stats))
    return stats[0] if stats[1, 0, 0, 0] == _LSE_ONLY else None


_LARGEST_SHIFT = 2.0**26
"""From here on Triton's kernels may scale a row's scores by another power of two."""


def lse_of_sums(call: Call, stats: torch.Tensor) -> torch.Tensor:
    """log(sum of exp(score)) [B, H, Nq] by each row's shift and sum [2, B, H, Nq] in Triton.

    Shifts are powers of two, but with a mask or bias natural. +inf for a row that sees nothing,
    whose weights exp(score - lse) are 0 then.
    """
    shift, total = stats[0], stats[1]
    unit = 1.0 if call.mask is not None or call.bias is not None else math.log(2)
    lse = torch.where(total == 0, math.inf, shift * unit + total.log())
    return lse.masked_fill((shift.abs() >= _LARGEST_SHIFT) & (total != 0), math.nan)


def _chosen(call: Call, problem: Problem) -> str:
    """As `fused.choose`, by what the device's table or `forcing` says."""
    chosen = kernel(call)
    if chosen == "xformers" and not problem.is_causal:
        return chosen
    with _choosing(chosen):
        return fused.choose(problem)


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, Nq, H, D], and for the backward the log-sum-exp of the kernel that torch chose."""
    problem = _problem(call, *prologue(call))
    chosen = _chosen(call, problem) if call.save_stats else ""
    lse = None
    if not chosen:
        out = _sdpa(problem, kernel(call))
    elif chosen == "math":
        out, lse = reference.attend(call, *problem[:3], with_lse=True)
    else:
        out, lse = fused.KERNELS[chosen].forward(problem)
    out = out.to(call.q.dtype).transpose(1, 2).contiguous()
    return out, no_stats(call, out) if lse is None else _stats_of(call, out, lse)


def backward(
    grad: torch.Tensor, call: Call, out: torch.Tensor, stats: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The backward of the kernel that torch chooses, by the forward's log-sum-exp.

    What is computed again is named here. The prologue, which is no matrix product. Where no fused
    kernel takes the call, the scores: see `reference.attend_backward`. The forward where it ran on
    another backend, and for devices and versions of torch whose kernels `fused` does not know.
    """

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Gradients:
        problem = _problem(call, q, k, v)
        result, seed = (t.transpose(1, 2).to(problem.q.dtype) for t in (out, grad))
        chosen = _chosen(call, problem)
        if not chosen:
            found = _through_autograd(seed, problem, kernel(call))
        elif chosen == "math":
            found = reference.attend_backward(seed, call, *problem[:3])
        else:
            serving, lse = fused.KERNELS[chosen], _lse_of(call, stats)
            if lse is None:
                result, lse = serving.forward(problem)
            found = serving.backward(seed, problem, result, lse)
        dq, dk, dv, dmask = found
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dmask

    return differentiate(call, attend)


def _through_autograd(grad: torch.Tensor, problem: Problem, chosen: str) -> Gradients:
    """The gradients of `_sdpa`, which is run again under autograd."""
    mask = problem.mask if problem.mask_grad else None
    operands = [t for t in (*problem[:3], mask) if t is not None]

    def run(*leaves: torch.Tensor) -> torch.Tensor:
        given: dict[str, Any] = dict(zip(Problem._fields[: len(leaves)], leaves, strict=True))
        return _sdpa(problem._replace(**given), chosen)

    dq, dk, dv, *dmask = gradients(run, operands, (grad,))
    return dq, dk, dv, dmask[0] if dmask else None


BACKEND = Backend("vendor", forward, can_run, backward)
