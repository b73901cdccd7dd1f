"""The public `attention`: meaning and checks; registration of `vitfast::attention`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vitfast.errors import InputTypeError, InputValueError
from vitfast.ops.attention import native, reference, vendor
from vitfast.ops.attention.reference import INPUTS, Call, unwritten_gradients, wants_gradient
from vitfast.runtime import checks, triton
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import (
    autocast_args,
    autocast_dtype,
    define,
    needs_grad,
    without_autocast,
)
from vitfast.runtime.triton_backend import lazy


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
    backend: str = "auto",
) -> torch.Tensor:
    """softmax(scale * q k^T + mask + bias) v, per head (Vaswani et al. 2017; timm `AttentionRope`).

    Args:
        q: [B, Nq, H, D], float32, float16, bfloat16 or float64, any strides; or q, k and v packed
            as [B, N, 3, H, D], which is what a fused qkv projection gives.
        k, v: [B, Nk, H, D], dtype of q; None with a packed q.
        mask: broadcastable to [B, H, Nq, Nk]. bool: True keeps the key; floating: added to the
            scaled scores. A query that sees no key (all False or -inf) gives 0 and no gradient.
            Keys and values that are masked away must be finite: 0 * NaN is NaN.
        bias: [H, Nq, Nk] or [1, H, Nq, Nk], floating, added to the scaled scores.
        is_causal: query i sees keys j <= i only; may be combined with mask and bias.
        scale: factor of the scores; D**-0.5 by default.
        qk_norm: "layer" or "rms": normalise q and k over D, before the rotation.
        q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias: [D], any floating dtype; no bias
            with "rms".
        qk_norm_eps: added to the variance or the mean square.
        rope: timm's cat(sin, cos) embedding, [N', 2D], [H, N', 2D] or [B|1, H|1, N', 2D], any
            floating dtype; turns tokens [rope_prefix:] of q and k, N' of them (Su et al. 2021).
        rope_prefix: leading tokens (class, registers) left alone.
        rope_half: turn halves of D (DINOv3) instead of neighbouring pairs (EVA-02).
        backend: "auto", or a name that then must be able to run.

    Returns:
        [B, Nq, H, D], contiguous, dtype of v. Under autocast q, k, v, and floating mask and bias,
        are cast to its dtype, as for torch's SDPA. Not twice differentiable.

    Raises:
        InputTypeError, InputValueError, UnsupportedInputError, DeviceError: bad arguments.
        BackendUnavailableError: the backend asked for cannot run.
    """
    q, k, v, mask, bias = _typed(q, k, v, mask, bias)
    weights = (q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias)
    call = Call(
        q, k, v, mask, bias, bool(is_causal), scale, qk_norm or "", *weights, qk_norm_eps,
        rope, rope_prefix, bool(rope_half), needs_grad(q, k, v, mask, bias, *weights, rope),
        needs_grad(mask), needs_grad(bias), needs_grad(rope),
    )  # fmt: skip
    _check(call)
    if any(is_traceable_wrapper_subclass(t) for t in call if isinstance(t, torch.Tensor)):
        # Such a tensor (a DTensor, say) knows torch's ops and not this one.
        return vendor.compute(call.scaled())
    return _OP(*call, backend)[0]


_Inputs = tuple[
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
]


def _typed(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> _Inputs:
    """q, k, v, mask and bias after their type checks, in the dtypes that autocast gives them."""
    for name, t in (("q", q), ("k", k), ("v", v), ("bias", bias)):
        if t is not None or name == "q":
            checks.check_tensor("attention", name, t)
    if mask is not None:
        checks.check_tensor("attention", "mask", mask, (torch.bool, *checks.FLOATS))
    if (k is None) != (v is None):
        raise InputValueError("attention: k and v go together; leave out both for a packed q")
    if autocast_dtype(q.device) is not None:
        lower, k, v, mask, bias = autocast_args(q.device, (q, k, v, mask, bias))
        q = q if lower is None else lower
    checks.check_same_dtype("attention", q=q, k=k, v=v)
    for name, t in (("mask", mask), ("bias", bias)):
        if t is not None and t.dtype == torch.float64 != q.dtype:
            raise InputTypeError(
                f"attention: {name} has dtype {t.dtype} beside q of {q.dtype}; expected {q.dtype}"
                " or float32"
            )
    return q, k, v, mask, bias


def _check(call: Call) -> None:
    """Everything about shapes, values and devices."""
    q, k, v, mask, bias = call[:5]
    norms = {n: getattr(call, n) for n in INPUTS if "_norm_" in n}
    for name, t in (*norms.items(), ("rope", call.rope)):
        if t is not None:
            checks.check_tensor("attention", name, t)
    checks.check_same_device(
        "attention", q=q, k=k, v=v, mask=mask, bias=bias, rope=call.rope, **norms
    )
    if k is None:
        if q.ndim != 5 or q.shape[2] != 3:
            raise InputValueError(
                f"attention: q has shape {tuple(q.shape)}; without k and v it must be the packed"
                " [B, N, 3, H, D]"
            )
    else:
        for name, t in (("q", q), ("k", k), ("v", v)):
            if t is not None and t.ndim != 4:
                raise InputValueError(
                    f"attention: {name} has shape {tuple(t.shape)}, expected [B, N, H, D]"
                )
        batch, _, heads, dim = q.shape
        checks.check_shape("attention", "k", k, (batch, k.shape[1], heads, dim))
        checks.check_shape("attention", "v", v, (batch, k.shape[1], heads, dim))
    if q.shape[-1] == 0:
        raise InputValueError(f"attention: q has shape {tuple(q.shape)}: its head dim is empty")
    if call.scale is not None and not math.isfinite(call.scale):
        raise InputValueError(f"attention: scale must be finite, got {call.scale}")
    size = sizes(call)
    batch, queries, keys, heads, dim = size
    if mask is not None:
        wanted = (batch, heads, queries, keys)
        fits = mask.ndim <= 4 and all(
            m in (1, w) for m, w in zip(reversed(mask.shape), reversed(wanted), strict=False)
        )
        if not fits:
            raise InputValueError(
                f"attention: mask has shape {tuple(mask.shape)}, not broadcastable to {wanted}"
            )
    if bias is not None and tuple(bias.shape) not in (
        (heads, queries, keys), (1, heads, queries, keys),
    ):  # fmt: skip
        raise InputValueError(
            f"attention: bias has shape {tuple(bias.shape)}, expected {(heads, queries, keys)}"
        )
    check_qk_norm("attention", call.qk_norm, call.qk_norm_eps, norms, dim)
    _check_rope(call, size)


def check_qk_norm(
    op: str, kind: str, eps: float, norms: dict[str, torch.Tensor | None], dim: int
) -> None:
    """What concerns q/k norm of a kind and eps; `norms` are the norms' weights and biases by name,
    each [dim] or None."""
    if kind not in ("", "layer", "rms"):
        raise InputValueError(f"{op}: qk_norm must be None, 'layer' or 'rms', got {kind!r}")
    for name, t in norms.items():
        if t is not None and not kind:
            raise InputValueError(f"{op}: {name} was given without qk_norm")
        if t is not None and kind == "rms" and name.endswith("bias"):
            raise InputValueError(f"{op}: {name} was given, but an RMS norm has no bias")
        checks.check_shape(op, name, t, (dim,))
    checks.check_eps(op, eps)


def _check_rope(call: Call, size: tuple[int, int, int, int, int]) -> None:
    """What concerns the rotary embedding; size as of `sizes`."""
    rope, prefix = call.rope, call.rope_prefix
    batch, queries, keys, heads, dim = size
    if not 0 <= prefix <= queries:
        raise InputValueError(f"attention: rope_prefix is {prefix}, expected 0 to {queries}")
    if rope is None:
        return
    if dim % 2:
        raise InputValueError(f"attention: rope needs an even head dim, got {dim}")
    if queries != keys:
        raise InputValueError(
            f"attention: rope turns q and k alike, but q has {queries} tokens and k {keys}"
        )
    leading: tuple[tuple[int, int], ...] = ((1, batch), (1, heads))[4 - rope.ndim :]
    fits = 2 <= rope.ndim <= 4 and tuple(rope.shape[-2:]) == (queries - prefix, 2 * dim)
    if not fits or any(s not in allowed for s, allowed in zip(rope.shape, leading, strict=False)):
        raise InputValueError(
            f"attention: rope has shape {tuple(rope.shape)}, expected"
            f" [{queries - prefix}, {2 * dim}], with leading [{heads}] or [{batch}, {heads}]"
        )


def sizes(call: Call) -> tuple[int, int, int, int, int]:
    """B, Nq, Nk, H, D."""
    batch, queries = call.q.shape[:2]
    heads, dim = call.q.shape[-2:]
    return batch, queries, queries if call.k is None else call.k.shape[1], heads, dim


def _reference_forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    out = reference.compute(call)
    return out, vendor.no_stats(call, out)


def _reference_backward(
    grad: torch.Tensor, call: Call, out: torch.Tensor, stats: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return reference.backward(grad, call)


def _triton_reasons(call: Call) -> list[str]:
    tensors = (t for t in call if isinstance(t, torch.Tensor) and t.is_floating_point())
    why = triton.reasons(*tensors, dots=True)
    if call.q.shape[-1] > 256:
        why.append(f"head dim {call.q.shape[-1]} is above 256")
    if call.mask_grad:
        why.append("mask requires grad; the kernels have a gradient for bias only")
    if call.rope_grad:
        why.append("rope requires grad; it is taken as a constant")
    return why


def backend_key(call: Call) -> dict[str, int | str]:
    """What it depends on whether Triton's kernels or the vendor's are faster."""
    added = "mask or bias" if call.mask is not None or call.bias is not None else ""
    return {**vendor.key_of(call.q, call.save_stats), "added": added}


DISPATCHER = Dispatcher(
    "attention",
    [
        native.BACKEND,
        lazy("vitfast.ops.attention.triton", _triton_reasons, key=backend_key),
        vendor.BACKEND,
        Backend("reference", _reference_forward, lambda call: [], _reference_backward),
    ],
)


def _forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *inputs, backend = args
    call = Call(*inputs).scaled()
    chosen = DISPATCHER.pick(backend, call, needs_backward=call.save_stats)
    if 0 in sizes(call):
        out, stats = _fake(*args)
        return out.zero_(), stats.zero_()
    with without_autocast(call.q.device):
        return chosen.forward(call)


def _fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = Call(*args[:-1])
    batch, queries, _, heads, dim = sizes(call)
    out = call.q.new_empty(batch, queries, heads, dim)
    shape = (2, batch, heads, queries) if call.save_stats else (0,)
    return out, call.q.new_empty(shape, dtype=torch.promote_types(call.q.dtype, torch.float32))


def _backward(
    grad: torch.Tensor, out: torch.Tensor, stats: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, ...]:
    *inputs, backend = args
    call = Call(*inputs).scaled()
    chosen = DISPATCHER.pick_backward(backend, call)
    if 0 in sizes(call):
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
    ctx.options = [None if n in INPUTS else getattr(call, n) for n in Call._fields]
    ctx.save_for_backward(*output, *(getattr(call, n) for n in INPUTS))
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    out, stats, *tensors = ctx.saved_tensors
    call = Call(*ctx.options)._replace(**dict(zip(INPUTS, tensors, strict=True)))
    found = dict(
        zip(
            INPUTS,
            _BACKWARD_OP(grad, out, stats, *call, ctx.backend),
            strict=True,
        )
    )
    wanted = {n: g for n, g in found.items() if wants_gradient(call, n)}
    return *(wanted.get(n) for n in Call._fields), None


_ARGUMENTS = (
    "Tensor q, Tensor? k, Tensor? v, Tensor? mask, Tensor? bias, bool is_causal, float? scale,"
    " str qk_norm, Tensor? q_norm_weight, Tensor? q_norm_bias, Tensor? k_norm_weight,"
    " Tensor? k_norm_bias, float qk_norm_eps, Tensor? rope, int rope_prefix, bool rope_half,"
    " bool save_stats, bool mask_grad, bool bias_grad, bool rope_grad, str backend"
)
_BACKWARD_OP = define(
    "attention_backward",
    f"(Tensor grad, Tensor out, Tensor stats, {_ARGUMENTS}) -> ({', '.join(['Tensor'] * 10)})",
    _backward,
    _backward_fake,
)
_OP = define(
    "attention",
    f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_autograd,
)
