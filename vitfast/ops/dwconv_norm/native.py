"""dwconv_norm on the kernels of csrc/cpu/dwconv.h."""

from __future__ import annotations

import torch

from vitfast.errors import InputValueError
from vitfast.ops.common import norm as norm_op
from vitfast.ops.dwconv_norm.reference import BackwardCall, Call
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend
from vitfast.runtime.native import DTYPE_CODES

WIDEST = 31
"""Most rows or columns of a kernel: `kDwconvWidest` in csrc/cpu/dwconv.h, as wide as the largest
kernels that are in use (RepLKNet's)."""
_CHUNK_BYTES = 8 << 20
"""Of the convolution's result in float32, for the images that the backward takes at a time. It and
its gradient then fit the last-level cache of a server. Chosen, not measured yet."""


def can_run(call: Call) -> list[str]:
    """Why the kernels cannot take this call; empty when they can."""
    tensors = (call.x, call.weight, call.bias, call.norm_weight, call.norm_bias)
    why = norm_op.reasons(*tensors, out_dtype=call.out_dtype)
    if call.dtype not in norm_op.DTYPES:
        why.append(f"{call.dtype} is not implemented, float32 and bfloat16 are")
    kernel = tuple(call.weight.shape[2:])
    if max(kernel) > WIDEST:
        why.append(f"a kernel of {kernel}; at most {WIDEST} are implemented")
    return why


def run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    norm: str | None = "layer",
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    rows: tuple[int, int] | None = None,
    out: torch.Tensor | None = None,
    stats: torch.Tensor | None = None,
    flipped: bool = False,
) -> torch.Tensor:
    """The forward without dispatch, for the backward and for inference in stripes.

    Args:
        dtype: what x, weight and bias are rounded to first; x's by default.
        rows: lines [first, last) of every image; all by default. The same bits as of all.
        out: [B, last - first, W, C], contiguous, to write to; may not overlap x.
        stats: [B * (last - first) * W, 2] in float32, to write to.
        flipped: taps in the opposite order, and x as it is: with norm=None the gradient of x from
            that of a result.
    """
    b, h, w, c = x.shape
    first, last = rows or (0, h)
    shape = (b, last - first, w, c)
    if not 0 <= first <= last <= h:
        raise InputValueError(f"dwconv_norm: rows {rows} of a map of {h}")
    if out is None:
        out = native.empty(shape, out_dtype or x.dtype)
    elif out.shape != shape or not out.is_contiguous():
        raise InputValueError(
            f"dwconv_norm: out has shape {tuple(out.shape)}, expected {shape}, contiguous"
        )
    if out.numel() == 0:
        return out
    dtype = dtype or x.dtype
    weight, bias = norm_op.vector(weight), norm_op.vector(bias)
    norm_weight, norm_bias = norm_op.vector(norm_weight), norm_op.vector(norm_bias)
    native.native().dwconv_forward(
        _sizes(x, weight),
        norm_op.NONE if norm is None else norm_op.KINDS[norm],
        _map(x, x.dtype if flipped else dtype),
        _vector(weight),
        dtype == torch.bfloat16,
        flipped,
        _vector(bias),
        _vector(norm_weight),
        _vector(norm_bias),
        eps,
        (first, last),
        _vector(out),
        native.address(stats),
    )
    return out


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The result [B, H, W, C] and the rows' statistics [B * H * W, 2], float32, or nothing."""
    stats = norm_op.fake_stats(call.x, call.save_stats, torch.float32)
    y = run(
        call.x, call.weight, call.bias, call.norm_weight, call.norm_bias, call.eps,
        norm=call.norm, dtype=call.dtype, out_dtype=call.out_dtype, stats=stats,
    )  # fmt: skip
    return y, stats


def backward(call: BackwardCall) -> tuple[torch.Tensor, ...]:
    """Gradients of `INPUTS`, empty where not wanted; the convolution is computed again."""
    grad, x, weight, dtype = call.grad, call.x, call.weight, call.dtype
    dx, *others = (
        native.empty(t.shape, t.dtype) if w and t is not None else grad.new_empty(0)
        for t, w in zip(call.inputs, call.wanted, strict=True)
    )
    if x.numel() == 0:
        return dx, *(t.zero_() for t in others)
    if call.norm is None:
        _gradients(grad, x, weight, dtype, dx, *others[:2])
        return dx, *others
    # A few images at a time, so that the convolution's result and its gradient stay in a cache.
    # What the chunks add up to is summed in float64, and rounded once.
    h, w, c = x.shape[1:]
    images = max(_CHUNK_BYTES // (4 * h * w * c), 1)
    parts = [torch.empty(t.shape, dtype=torch.float32, device=t.device) for t in others[:2]]
    totals = [torch.zeros(t.shape, dtype=torch.float64, device=t.device) for t in others]
    affine = [None if t is None else t.float() for t in (call.norm_weight, call.norm_bias)]
    for i in range(0, len(x), images):
        part = slice(i, i + images)
        z = run(x[part], weight, call.bias, norm=None, dtype=dtype, out_dtype=torch.float32)
        dz, _, _, *daffine = norm_op.backward(
            norm_op.KINDS[call.norm], grad[part], z, call.stats[i * h * w : (i + images) * h * w],
            weight=affine[0], bias=affine[1], eps=call.eps,
        )  # fmt: skip
        _gradients(dz, x[part], weight, dtype, dx[part], *parts)
        for total, found in zip(totals, (*parts, *daffine), strict=True):
            if total.numel():
                total += found
    for t, total in zip(others, totals, strict=True):
        t.copy_(total)
    return dx, *others


def _gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype,
    dx: torch.Tensor, dweight: torch.Tensor, dbias: torch.Tensor,
) -> None:  # fmt: skip
    """Writes the gradients of the convolution alone, those that have elements."""
    if dx.numel():
        run(grad, weight, norm=None, dtype=dtype, flipped=True, out=dx)
    if dweight.numel() or dbias.numel():
        native.native().dwconv_weight_grad(
            _sizes(x, weight), _map(x, dtype), _map(grad, grad.dtype),
            _vector(dweight) if dweight.numel() else None,
            _vector(dbias) if dbias.numel() else None,
        )  # fmt: skip


def _sizes(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Size, torch.Size, int]:
    return x.shape, weight.shape[2:], native.threads()


def _map(x: torch.Tensor, dtype: torch.dtype) -> tuple[int, int, tuple[int, ...], bool]:
    """Address, dtype and strides; whether its elements are rounded to bfloat16 first."""
    strides = x.stride() if x.shape[3] > 1 else (*x.stride()[:3], 1)
    rounded = dtype == torch.bfloat16 and x.dtype != dtype
    return native.address(x), DTYPE_CODES[x.dtype], strides, rounded


def _vector(t: torch.Tensor | None) -> tuple[int, int] | None:
    return None if t is None else (native.address(t), DTYPE_CODES[t.dtype])


BACKEND = Backend("cpu", forward, can_run, backward, native.reasons)
