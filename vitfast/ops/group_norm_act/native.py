"""GroupNorm on the kernels of csrc/cpu/group_norm.h; what its backends share of layouts.

`run` is also what layers call in inference, without the dispatcher: it checks nothing.
"""

from __future__ import annotations

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.group_norm_act.reference import channels_last, laid
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend
from vitfast.runtime.native import DTYPE_CODES


def empty(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A map like x, dense, in its layout."""
    b, c, h, w = x.shape
    if channels_last(x):
        return native.empty((b, h, w, c), dtype, x.device).permute(0, 3, 1, 2)
    return native.empty((b, c, h, w), dtype, x.device)


def result_dtype(x: torch.Tensor, residual: torch.Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def can_run(x, groups, weight, bias, eps, residual, act, out_dtype, save_stats):
    out_dtype = out_dtype or result_dtype(x, residual)
    return norm_op.reasons(x, weight, bias, residual, out_dtype=out_dtype)


def forward(x, groups, weight, bias, eps, residual, act, out_dtype, save_stats):
    y = empty(x, out_dtype or result_dtype(x, residual))
    stats = norm_op.absent(x)
    if save_stats:
        stats = torch.empty((x.shape[0], groups, 2), dtype=torch.float32, device=x.device)
    if x.numel():
        last = channels_last(x)
        x, residual = dense(x, last), dense(residual, last)
        weight, bias = norm_op.vector(weight), norm_op.vector(bias)
        run(x, groups, weight, bias, eps, residual, act == "relu", y, last, stats)
    return y, stats


def run(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    relu: bool,
    y: torch.Tensor,
    last: bool = True,
    stats: torch.Tensor | None = None,
) -> None:
    """Writes y, which may lie exactly over x or the residual.

    Args:
        x, residual: [B, C, H, W], not empty, dense but for their batch stride; channels are
            contiguous with `last`, pixels without.
        weight, bias: [C], contiguous.
        y: x's shape; with `last` its lines may lie apart, as in a part of a larger map.
        stats: [B, groups, 2] in float32, overwritten; None or empty: not wanted.
    """
    b, c, h, w = x.shape
    native.native().group_norm_forward(
        ((b, c, h, w, groups), last, relu, eps, native.threads()),
        _map(x, last),
        None if residual is None else _map(residual, last),
        _map(y, last, y.stride(2) if last and h > 1 else None),
        _channels(weight),
        _channels(bias),
        native.address(stats),
    )


def backward(grad, x, y, weight, bias, groups, eps, residual_dtype, stats):
    dx = empty(x, x.dtype)
    dresidual = norm_op.absent(x) if residual_dtype is None else empty(x, residual_dtype)
    dweight, dbias = (
        norm_op.absent(x) if v is None else torch.empty(v.shape, dtype=v.dtype, device=v.device)
        for v in (weight, bias)
    )
    if x.numel() == 0:
        return dx, dresidual, dweight.zero_(), dbias.zero_()
    last = channels_last(x)
    x, grad, y, weight = dense(x, last), dense(grad, last), dense(y, last), norm_op.vector(weight)
    native.native().group_norm_backward(
        ((*x.shape, groups), last, y is not None, eps, native.threads()),
        _map(grad, last),
        _map(x, last),
        None if y is None else _map(y, last),
        _map(dx, last),
        None if residual_dtype is None else _map(dresidual, last),
        _channels(weight),
        None if weight is None else _channels(dweight),
        None if bias is None else _channels(dbias),
        native.address(stats),
    )
    return dx, dresidual, dweight, dbias


def dense(t: torch.Tensor | None, last: bool) -> torch.Tensor | None:
    """The map itself where the kernels can address it, else a copy."""
    if t is None:
        return None
    _, c, h, w = t.shape
    _, channel, line, pixel = t.stride()
    if last:
        fits = (c == 1 or channel == 1) and (h == 1 or w == 1 or line == w * pixel)
    else:
        fits = (w == 1 or pixel == 1) and (h == 1 or line == w)
    return t if fits else laid(t, last)


def _map(t: torch.Tensor, last: bool, line: int | None = None) -> tuple[int, ...]:
    """As the kernels take it; strides of dimensions of size 1 mean nothing, and are replaced."""
    w = t.shape[3]
    sample, channel, stride, pixel = t.stride()
    if not last:
        return native.address(t), DTYPE_CODES[t.dtype], sample, channel, w, 1
    if w == 1:
        pixel = stride
    return native.address(t), DTYPE_CODES[t.dtype], sample, 1, line or w * pixel, pixel


def _channels(t: torch.Tensor | None) -> tuple[int, int] | None:
    return None if t is None else (native.address(t), DTYPE_CODES[t.dtype])


BACKEND = Backend("cpu", forward, can_run, backward, native.reasons)
