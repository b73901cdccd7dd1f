"""The public `varlen_attention`: meaning and checks; registration of its op."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vitfast.errors import InputTypeError, InputValueError
from vitfast.ops.attention.api import check_qk_norm
from vitfast.ops.attention.reference import unwritten_gradients, wants_gradient
from vitfast.ops.varlen_attention import native, reference, vendor
from vitfast.ops.varlen_attention.reference import INPUTS, Call
from vitfast.runtime import checks
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import autocast_args, define, needs_grad, without_autocast


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
    backend: str = "auto",
) -> torch.Tensor:
    """softmax(scale * q k^T) v, per head, within each sequence of a packed batch.

    The sequences follow each other without padding, as in FlashAttention's `flash_attn_varlen_func`
    (Dao 2023) and torch's `varlen_attn`; there is no mask between them. Of one sequence the result
    is that of `vitfast.ops.attention`.

    Args:
        q: [total, H, D], float32, float16, bfloat16 or float64, any strides; or q, k and v packed
            as [total, 3, H, D], which is what a fused qkv projection gives.
        k, v: [total, H, D], dtype of q; None with a packed q.
        cu_seqlens: [B + 1], int32, on q's device: sequence i is the tokens from cu_seqlens[i] to
            cu_seqlens[i + 1]. Begins with 0, never decreases, ends with total; a sequence may be
            empty. On the CPU, and by the reference, this is checked. On a GPU it is not: a call
            does not wait for the values, and wrong ones give a result that means nothing.
        max_seqlen: at least the length of the longest sequence; on a GPU a call without it reads
            it from cu_seqlens, which waits for the device.
        is_causal: token i of a sequence sees its tokens j <= i only.
        scale: factor of the scores; D**-0.5 by default.
        qk_norm: "layer" or "rms": normalise q and k over D, before the rotation.
        q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias: [D], any floating dtype; no bias
            with "rms".
        qk_norm_eps: added to the variance or the mean square.
        rope: timm's cat(sin, cos) embedding of every token, [total, 2D] or [H, total, 2D], any
            floating dtype (Su et al. 2021). A token that is not to be turned (class, registers)
            has sin 0 and cos 1.
        rope_half: turn halves of D (DINOv3) instead of neighbouring pairs (EVA-02).
        backend: "auto", or a name that then must be able to run.

    Returns:
        [total, H, D], contiguous, dtype of v. Under autocast q, k and v are cast to its dtype, as
        for torch's SDPA. Not twice differentiable.

    Raises:
        InputTypeError, InputValueError, UnsupportedInputError, DeviceError: bad arguments.
        BackendUnavailableError: the backend asked for cannot run.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t is not None or name == "q":
            checks.check_tensor("varlen_attention", name, t)
    checks.check_tensor("varlen_attention", "cu_seqlens", cu_seqlens, (torch.int32,))
    if (k is None) != (v is None):
        raise InputValueError(
            "varlen_attention: k and v go together; leave out both for a packed q"
        )
    lowered, k, v = autocast_args(q.device, (q, k, v))
    q = q if lowered is None else lowered
    checks.check_same_dtype("varlen_attention", q=q, k=k, v=v)
    weights = (q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias)
    call = Call(
        q, k, v, cu_seqlens, max_seqlen, bool(is_causal), scale, qk_norm or "", *weights,
        qk_norm_eps, rope, bool(rope_half), needs_grad(q, k, v, *weights, rope), needs_grad(rope),
    )  # fmt: skip
    _check(call)
    if any(is_traceable_wrapper_subclass(t) for t in call if isinstance(t, torch.Tensor)):
        # Such a tensor (a DTensor, say) knows torch's ops and not this one.
        return reference.compute(call)
    return _OP(*call, backend)[0]


def has_kernel(q: torch.Tensor) -> bool:
    """Whether a backend other than the reference takes plain calls with a q like this one, whose
    values are not looked at; by `backend="auto"`.

    Args:
        q: [total, H, D], or packed [total, 3, H, D].
    """
    cu_seqlens = q.new_empty(1, dtype=torch.int32)
    call = Call(q, None, None, cu_seqlens, None, False, None, "", None, None, None, None, 1e-6,
                None, False)  # fmt: skip
    return any(not backend.can_run(call) for backend in (native.BACKEND, vendor.BACKEND))


def _check(call: Call) -> None:
    """Everything about shapes and devices, and about the values of what is no tensor."""
    op, q = "varlen_attention", call.q
    norms = {n: getattr(call, n) for n in INPUTS if "_norm_" in n}
    for name, t in (*norms.items(), ("rope", call.rope)):
        if t is not None:
            checks.check_tensor(op, name, t)
    checks.check_same_device(
        op, q=q, k=call.k, v=call.v, cu_seqlens=call.cu_seqlens, rope=call.rope, **norms
    )
    if call.k is None:
        if q.ndim != 4 or q.shape[1] != 3:
            raise InputValueError(
                f"{op}: q has shape {tuple(q.shape)}; without k and v it must be the packed"
                " [total, 3, H, D]"
            )
    else:
        if q.ndim != 3:
            raise InputValueError(f"{op}: q has shape {tuple(q.shape)}, expected [total, H, D]")
        for name, t in (("k", call.k), ("v", call.v)):
            checks.check_shape(op, name, t, tuple(q.shape))
    total, *_, heads, dim = q.shape
    if dim == 0:
        raise InputValueError(f"{op}: q has shape {tuple(q.shape)}: its head dim is empty")
    if call.cu_seqlens.ndim != 1 or len(call.cu_seqlens) == 0:
        raise InputValueError(
            f"{op}: cu_seqlens has shape {tuple(call.cu_seqlens.shape)}, expected [B + 1]"
        )
    if call.max_seqlen is not None:
        if not isinstance(call.max_seqlen, int | torch.SymInt) or isinstance(call.max_seqlen, bool):
            raise InputTypeError(
                f"{op}: max_seqlen must be an int or None, got {type(call.max_seqlen).__name__}"
            )
        if call.max_seqlen < 0:
            raise InputValueError(f"{op}: max_seqlen is {call.max_seqlen}, expected at least 0")
    if call.scale is not None and not math.isfinite(call.scale):
        raise InputValueError(f"{op}: scale must be finite, got {call.scale}")
    check_qk_norm(op, call.qk_norm, call.qk_norm_eps, norms, dim)
    _check_rope(call, total, heads, dim)


def _check_rope(call: Call, total: int, heads: int, dim: int) -> None:
    """What concerns the rotary embedding."""
    op, rope = "varlen_attention", call.rope
    if rope is None:
        return
    if dim % 2:
        raise InputValueError(f"{op}: rope needs an even head dim, got {dim}")
    if tuple(rope.shape) not in ((total, 2 * dim), (heads, total, 2 * dim)):
        raise InputValueError(
            f"{op}: rope has shape {tuple(rope.shape)}, expected [{total}, {2 * dim}]"
            f" or [{heads}, {total}, {2 * dim}]"
        )


def _reference_forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    out = reference.compute(call)
    return out, vendor.no_stats(call, out)


def _reference_backward(
    grad: torch.Tensor, call: Call, out: torch.Tensor, stats: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return reference.backward(grad, call)


DISPATCHER = Dispatcher(
    "varlen_attention",
    [
        native.BACKEND,
        vendor.BACKEND,
        Backend("reference", _reference_forward, lambda call: [], _reference_backward),
    ],
)


def _forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *inputs, backend = args
    call = Call(*inputs)
    if call.cu_seqlens.is_cpu:
        reference.offsets(call)  # before anything runs, and of an empty batch, too
    chosen = DISPATCHER.pick(backend, call, needs_backward=call.save_stats)
    if call.q.numel() == 0:
        out, stats = _fake(*args)
        return out.zero_(), stats.zero_()
    with without_autocast(call.q.device):
        return chosen.forward(call)


def _fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = Call(*args[:-1])
    total, *_, heads, dim = call.q.shape
    out = call.q.new_empty(total, heads, dim)
    shape = (2, heads, total) if call.save_stats else (0,)
    return out, call.q.new_empty(shape, dtype=torch.promote_types(call.q.dtype, torch.float32))


def _backward(
    grad: torch.Tensor, out: torch.Tensor, stats: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, ...]:
    *inputs, backend = args
    call = Call(*inputs)
    chosen = DISPATCHER.pick_backward(backend, call)
    if call.q.numel() == 0:
        return tuple(g.zero_() for g in _backward_fake(grad, out, stats, *args))
    with without_autocast(call.q.device):
        return chosen(grad, call, out, stats)


def _backward_fake(
    grad: torch.Tensor, out: torch.Tensor, stats: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, ...]:
    return unwritten_gradients(Call(*args[:-1]), INPUTS)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    call = Call(*inputs[:-1])
    ctx.backend = inputs[-1]
    ctx.options = [None if n in _SAVED else getattr(call, n) for n in Call._fields]
    ctx.save_for_backward(*output, *(getattr(call, n) for n in _SAVED))
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    out, stats, *tensors = ctx.saved_tensors
    call = Call(*ctx.options)._replace(**dict(zip(_SAVED, tensors, strict=True)))
    found = dict(zip(INPUTS, _BACKWARD_OP(grad, out, stats, *call, ctx.backend), strict=True))
    wanted = {n: g for n, g in found.items() if wants_gradient(call, n)}
    return *(wanted.get(n) for n in Call._fields), None


_SAVED = (*INPUTS, "cu_seqlens")
_ARGUMENTS = (
    "Tensor q, Tensor? k, Tensor? v, Tensor cu_seqlens, SymInt? max_seqlen, bool is_causal,"
    " float? scale, str qk_norm, Tensor? q_norm_weight, Tensor? q_norm_bias,"
    " Tensor? k_norm_weight, Tensor? k_norm_bias, float qk_norm_eps, Tensor? rope, bool rope_half,"
    " bool save_stats, bool rope_grad, str backend"
)
_BACKWARD_OP = define(
    "varlen_attention_backward",
    f"(Tensor grad, Tensor out, Tensor stats, {_ARGUMENTS})"
    f" -> ({', '.join(['Tensor'] * len(INPUTS))})",
    _backward,
    _backward_fake,
)
_OP = define(
    "varlen_attention",
    f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_autograd,
)
