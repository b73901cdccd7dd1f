"""GroupNorm on the kernels of csrc/cpu/group_norm.h; what its backends share of layouts.

`run` is also what layers call in inference, without the dispatcher: it checks nothing.
"""

from __future__ import annotations

from typing import overload

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.group_norm_act.reference import (
    BackwardCall,
    Call,
    channels_last,
    laid,
    result_dtype,  # noqa: F401, for layers
)
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend
from vitfast.runtime.native import DTYPE_CODES


def empty(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A map like x, dense, in its layout."""
    b, c, h, w = x.shape
    if channels_last(x):
        return native.empty((b, h, w, c), dtype, x.device).permute(0, 3, 1, 2)
    return native.empty((b, c, h, w), dtype, x.device)


def can_run(call: Call) -> list[str]:
    """Why the kernels cannot take this call; empty when they can."""
    tensors = (call.x, call.weight, call.bias, call.residual)
    return norm_op.reasons(*tensors, out_dtype=call.result_dtype)


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The result [B, C, H, W] and the groups' statistics [B, groups, 2], float32, or nothing."""
    x = call.x
    y = empty(x, call.result_dtype)
    stats = norm_op.absent(x)
    if call.save_stats:
        stats = torch.empty((x.shape[0], call.groups, 2), dtype=torch.float32, device=x.device)
    if x.numel():
        last = channels_last(x)
        run(
            dense(x, last), call.groups, norm_op.vector(call.weight), norm_op.vector(call.bias),
            call.eps, dense(call.residual, last), call.act == "relu", y, last, stats,
        )  # fmt: skip
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


def backward(call: BackwardCall) -> tuple[torch.Tensor, ...]:
    """Gradients of x, residual, weight and bias, empty where absent or not wanted."""
    x, dtype = call.x, call.residual_dtype
    dx = empty(x, x.dtype)
    dresidual = norm_op.absent(x) if dtype is None else empty(x, dtype)
    dweight, dbias = (
        norm_op.absent(x) if v is None else torch.empty(v.shape, dtype=v.dtype, device=v.device)
        for v in (call.weight, call.bias)
    )
    if x.numel() == 0:
        return dx, dresidual, dweight.zero_(), dbias.zero_()
    last = channels_last(x)
    # The names keep dense copies alive until the kernel has run.
    x, grad, y = dense(x, last), dense(call.grad, last), dense(call.y, last)
    weight = norm_op.vector(call.weight)
    native.native().group_norm_backward(
        ((*x.shape, call.groups), last, y is not None, call.eps, native.threads()),
        _map(grad, last),
        _map(x, last),
        None if y is None else _map(y, last),
        _map(dx, last),
        None if dtype is None else _map(dresidual, last),
        _channels(weight),
        None if weight is None else _channels(dweight),
        None if call.bias is None else _channels(dbias),
        native.address(call.stats),
    )
    return dx, dresidual, dweight, dbias


@overload
def dense(t: torch.Tensor, last: bool) -> torch.Tensor: ...
@overload
def dense(t: torch.Tensor | None, last: bool) -> torch.Tensor | None: ...
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
