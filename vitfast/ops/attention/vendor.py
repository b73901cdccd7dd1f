"""Attention on torch's scaled_dot_product_attention, with the prologue in torch ops."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitfast.ops.attention.reference import Call, causal_keep, prologue
from vitfast.ops.common.autodiff import gradients
from vitfast.runtime.dispatch import Backend
from vitfast.runtime.launches import arch_of, choice_of

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


def wants_gradient(call: Call, name: str) -> bool:
    """Whether the backward op computes the gradient of this input."""
    return getattr(call, name) is not None and getattr(call, f"{name}_grad", True)


def differentiate(
    function: Callable[[Call], torch.Tensor], grad: torch.Tensor, call: Call
) -> tuple[torch.Tensor, ...]:
    """Gradients of function(call) for `INPUTS`, through autograd; empty where not wanted."""
    names = [n for n in INPUTS if wants_gradient(call, n)]
    found = gradients(
        lambda *leaves: function(call._replace(**dict(zip(names, leaves, strict=True)))),
        [getattr(call, n) for n in names],
        (grad,),
    )
    by_name = dict(zip(names, found, strict=True))
    return tuple(by_name[n] if n in by_name else call.q.new_empty(0) for n in INPUTS)


def compute(call: Call) -> torch.Tensor:
    """out [B, Nq, H, D] by differentiable torch ops."""
    q, k, v = prologue(call)
    dtype = v.dtype
    mask = _merged_mask(call, q, k)
    is_causal = call.is_causal and mask is None
    chosen = kernel(call)
    if chosen == "xformers" and not is_causal:
        return _xformers(q, k, v, call.factor)
    if q.device.type == "cuda" and mask is not None and mask.dtype not in (torch.bool, q.dtype):
        # The memory-efficient kernel wants one dtype, and rounding the mask would be felt.
        q, k, v = (t.to(mask.dtype) for t in (q, k, v))
    with _choosing(chosen):
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=call.factor
        )
    return out.to(dtype).transpose(1, 2).contiguous()


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
    try:
        yield
    finally:
        _forced.pop()


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
    """xformers' attention, [B, H, N, D] to [B, N, H, D]."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale)


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
    if call.save_stats and masked and not (call.mask_grad or call.bias_grad):
        # Its log-sum-exp of a row masked by finfo.min (NaFlexViT) cannot tell one key from many,
        # and the backward then weighs every key by 1. With a mask gradient it keeps the weights.
        return ["a float mask: SDPA's flash backward is wrong where the mask drowns the scores"]
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


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    out = compute(call)
    return out, no_stats(call, out)


def backward(
    grad: torch.Tensor, call: Call, out: torch.Tensor, stats: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Recomputes the forward under autograd, so that torch picks the backward that fits it."""
    return differentiate(compute, grad, call)


BACKEND = Backend("vendor", forward, can_run, backward)
