"""Global response norm on the kernels of csrc/cpu/grn.h.

`accumulate` and `scale_of` are its halves, for layers whose rows come chunk by chunk: the result is
x * scale + bias, whose scale and bias a matrix product behind it can take into its weights.
"""

from __future__ import annotations

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.grn.layout import empty, of_layout, planar_or_dense, sizes, steps
from vitfast.ops.grn.reference import Call
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend


def can_run(call: Call) -> list[str]:
    """Why the kernels cannot take this call; empty when they can."""
    return norm_op.reasons(call.x, call.weight, call.bias, out_dtype=call.result_dtype)


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The result and the channels' norms [B, C], float32."""
    x = call.x
    b, n, c = sizes(x)
    y = empty(x, call.result_dtype, native.empty)
    norms = torch.empty((b, c), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, norms.zero_()
    planar, x = planar_or_dense(x)
    # The names keep contiguous copies alive until the kernel has run.
    weight, bias = norm_op.vector(call.weight), norm_op.vector(call.bias)
    native.native().grn_forward(
        planar, b, n, c, _rows(x, planar), _rows(y, planar), _channels(weight), _channels(bias),
        call.eps, native.address(norms), native.threads(),
    )  # fmt: skip
    return y, norms


def backward(grad: torch.Tensor, call: Call, norms: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of x, weight and bias from the result's and the norms that `forward` gave."""
    x, weight = call.x, norm_op.vector(call.weight)
    b, n, c = sizes(x)
    dx = empty(x, x.dtype, native.empty)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(norm_op.vector(call.bias))
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    planar, x = planar_or_dense(x)
    grad = of_layout(grad, planar)
    native.native().grn_backward(
        planar, b, n, c, _rows(grad, planar), _rows(x, planar), _rows(dx, planar),
        _channels(weight), _channels(dweight), _channels(dbias), call.eps, native.address(norms),
        native.threads(),
    )  # fmt: skip
    return dx, dweight, dbias


BACKEND = Backend("cpu", forward, can_run, backward, native.reasons)


def _rows(t: torch.Tensor, planar: bool) -> tuple[int, int, int, int]:
    """Address, dtype, stride of images, and of positions or, planar, of channels."""
    outer, position, channel = steps(t, planar)
    return native.address(t), native.DTYPE_CODES[t.dtype], outer, channel if planar else position


def _channels(t: torch.Tensor) -> tuple[int, int]:
    return native.address(t), native.DTYPE_CODES[t.dtype]


# ---- the two halves ------------------------------------------------------------------------------


def accumulate(x: torch.Tensor, sums: torch.Tensor, adds: bool = True) -> None:
    """Adds to sums [C], float64, the squares of x [..., C], rows of one image; or writes them.

    The same bits for any number of threads; chunks of the same rows give the same.
    """
    if x.shape[-1] != sums.shape[0] or sums.dtype != torch.float64 or not sums.is_contiguous():
        raise ValueError(f"sums must be float64 [{x.shape[-1]}], got {sums.dtype} {sums.shape}")
    if x.numel() == 0:
        if not adds:
            sums.zero_()
        return
    x = x.reshape(-1, x.shape[-1])
    x = norm_op.dense(x[None])
    native.native().grn_accumulate(
        *x.shape[1:], _rows(x, False), native.address(sums), adds, native.threads()
    )


def scale_of(sums: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Of sums of squares [B, C] in float64: 1 + weight * n [B, C] in float32."""
    if sums.dtype != torch.float64 or sums.shape[1:] != weight.shape:
        raise ValueError(f"sums must be float64 [B, {len(weight)}], got {sums.dtype} {sums.shape}")
    scale = torch.empty(sums.shape, dtype=torch.float32, device=sums.device)
    if sums.numel():
        sums, weight = sums.contiguous(), norm_op.vector(weight)
        native.native().grn_scale(
            *sums.shape, native.address(sums), _channels(weight), eps, native.address(scale)
        )
    return scale
