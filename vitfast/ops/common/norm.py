"""What the norms, residual_add and patch_merge share: calls into csrc/cpu/norm.h, fakes.

`forward` is also what layers call in inference, without the dispatcher: it checks nothing beyond
what memory safety of its own outputs needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, overload

import torch

from vitfast.errors import InputValueError
from vitfast.runtime import native, triton
from vitfast.runtime.native import DTYPE_CODES

LAYER, RMS, NONE = 0, 1, 2
"""The numbers of `NormKind` in csrc/cpu/norm.h."""
KINDS = {"layer": LAYER, "rms": RMS}
"""By the names that the ops' `norm` takes."""
DTYPES = (torch.float32, torch.bfloat16)
"""What the native kernels read and write."""
_WIDEST = 16384
"""Channels of the widest row that a Triton program holds in registers.

Compiled for sm_80, add_norm's forward takes 124 registers a thread at this width and 254 of the
255 at twice that; its backward spills nothing up to 8192 channels, 824 bytes a thread at 16384 and
3456 at 32768. Swin-L's last patch merging has rows of 3072.
"""


def reasons(
    x: torch.Tensor, *others: torch.Tensor | None, out_dtype: torch.dtype | None = None
) -> list[str]:
    """Why the native kernels cannot take these tensors; empty when they can."""
    why = native.reasons()
    if x.device.type != "cpu":
        why.append(f"tensors are on {x.device}, not on the CPU")
    for dtype in {t.dtype for t in (x, *others) if t is not None} | {out_dtype or x.dtype}:
        if dtype not in DTYPES:
            why.append(f"{dtype} is not implemented, float32 and bfloat16 are")
    return why


def triton_reasons(
    x: torch.Tensor,
    *others: torch.Tensor | None,
    out_dtype: torch.dtype | None = None,
    channels: int | None = None,
) -> list[str]:
    """Why the Triton kernels cannot take these tensors; empty when they can."""
    why = triton.reasons(x, *others)
    if not why and out_dtype == torch.bfloat16 and x.device.type == "cpu":
        why.append("Triton's interpreter computes bfloat16 wrongly; use float16 or float32")
    channels = channels or x.shape[-1]
    if channels > _WIDEST:
        why.append(f"rows of {channels} channels; the kernels hold at most {_WIDEST}")
    return why


def forward(
    kind: int,
    x: torch.Tensor,
    *,
    branch: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    drop_scale: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    save_stats: bool = False,
    residual_out: torch.Tensor | None = None,
    normed_out: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
    normed_scale: torch.Tensor | None = None,
    merge: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """residual = x + drop_scale * gamma * branch, then its norm, in one pass over memory.

    Args:
        kind: LAYER, RMS, or NONE for the residual alone.
        x, branch: [..., C], float32 or bfloat16 each. Without a branch x itself is normalised.
        gamma, weight, bias: [C], float32 or bfloat16 each.
        drop_scale: [B], broadcast over all but the first dimension.
        out_dtype: dtype of the normed tensor, or of x's copy with kind NONE and no branch; the
            residual's by default.
        base, normed_scale: x's shape and [B]; normed is base + normed_scale * norm, without a
            branch.
        merge: x is a map [B, H, W, C / 4], whose 2x2 patches are the rows; without a branch.
        residual_out, normed_out: tensors of x's shape to write to, such as row slices of larger
            ones; their last dimension must be contiguous. The residual may go exactly over x or
            branch, the normed tensor over any of the three.

    Returns:
        residual (None without a branch, unless kind is NONE), normed (None with kind NONE), and
        statistics [rows, 2] in float32, mean and 1 / sqrt(var + eps) (None unless save_stats).
    """
    shape: tuple[int, ...] = merged_shape(x) if merge else x.shape
    device = x.device
    residual = normed = stats = None
    if branch is not None or kind == NONE:
        residual = residual_out
        if residual is None:
            dtype = out_dtype or x.dtype if branch is None else residual_dtype(x, branch, gamma)
            residual = native.empty(shape, dtype, device)
    if kind != NONE:
        normed = normed_out
        if normed is None:
            dtype = out_dtype or (x if residual is None else residual).dtype
            normed = native.empty(shape, dtype, device)
    numel = math.prod(shape)
    if save_stats:
        stats = torch.empty((math.prod(shape[:-1]), 2), dtype=torch.float32, device=device)
    if numel == 0:
        return residual, normed, stats
    c = shape[-1]
    b = shape[0] if len(shape) > 1 else 1
    nc = numel // b
    # The names keep contiguous copies alive until the kernel has run.
    x = dense_map(x) if merge else dense(x)
    branch, base = dense(branch), dense(base)
    gamma, weight, bias = vector(gamma), vector(weight), vector(bias)
    drop_scale, normed_scale = _float_vector(drop_scale), _float_vector(normed_scale)
    native.native().norm_forward(
        kind,
        b,
        nc // c,
        c,
        _map(x) if merge else _rows(x, nc, c),
        _rows(branch, nc, c),
        _out_rows(residual, shape, nc, c),
        _out_rows(normed, shape, nc, c),
        _channels(gamma),
        _channels(weight),
        _channels(bias),
        native.address(drop_scale),
        _rows(base, nc, c),
        native.address(normed_scale),
        eps,
        native.address(stats),
        native.threads(),
    )
    return residual, normed, stats


def backward(
    kind: int,
    grad_normed: torch.Tensor | None,
    residual: torch.Tensor,
    stats: torch.Tensor | None,
    *,
    grad_residual: torch.Tensor | None = None,
    branch: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    drop_scale: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    x_dtype: torch.dtype | None = None,
    x_wanted: bool = True,
    branch_dtype: torch.dtype | None = None,
    normed_scale: torch.Tensor | None = None,
    merge: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `forward` for x, branch, gamma, weight and bias, in one pass over memory.

    Args:
        residual: what was normalised: the residual, or x itself without a branch. With kind NONE
            only its shape counts. With merge it is the map, and x's gradient one too.
        stats: of the forward; None or empty: computed again.
        branch: given where gamma's gradient is wanted; an absent gamma counts as ones.
        x_dtype: dtype of x's gradient; residual's by default.
        branch_dtype: dtype of the branch's gradient; None where none is wanted.
        normed_scale: [B], factor of grad_normed.

    Returns:
        dx, dbranch, dgamma, dweight, dbias; empty where absent or not wanted.
    """
    shape: tuple[int, ...] = merged_shape(residual) if merge else residual.shape
    if grad_normed is None:
        kind = NONE
    dx = _empty(residual, residual.shape, (x_dtype or residual.dtype) if x_wanted else None)
    dbranch = _empty(residual, shape, branch_dtype)
    scale = branch if branch is None or gamma is None else gamma
    dgamma = _empty(residual, shape[-1:], None if scale is None else scale.dtype)
    dweight = _empty(residual, shape[-1:], None if weight is None else weight.dtype)
    dbias = _empty(residual, shape[-1:], None if bias is None else bias.dtype)
    numel = math.prod(shape)
    if numel == 0:
        return dx, dbranch, dgamma.zero_(), dweight.zero_(), dbias.zero_()
    c = shape[-1]
    b = shape[0] if len(shape) > 1 else 1
    nc = numel // b
    if kind == NONE:
        dweight.zero_()
        dbias.zero_()
        source = weight = None
    else:
        source = dense_map(residual) if merge else dense(residual)
    grad_normed, grad_residual = dense(grad_normed), dense(grad_residual)
    branch = dense(branch)
    gamma, weight = vector(gamma), vector(weight)
    drop_scale, normed_scale = _float_vector(drop_scale), _float_vector(normed_scale)
    rows_of_x = _map if merge else partial(_rows, nc=nc, c=c)
    wanted = kind != NONE
    native.native().norm_backward(
        kind,
        b,
        nc // c,
        c,
        _rows(grad_normed, nc, c),
        _rows(grad_residual, nc, c),
        rows_of_x(source),
        _rows(branch, nc, c),
        rows_of_x(dx) if x_wanted else None,
        _rows(dbranch, nc, c) if branch_dtype is not None else None,
        _channels(gamma),
        _channels(weight),
        _channels(dgamma) if branch is not None else None,
        _channels(dweight) if wanted and weight is not None else None,
        _channels(dbias) if wanted and bias is not None else None,
        native.address(drop_scale),
        native.address(normed_scale),
        eps,
        native.address(stats),
        native.threads(),
    )
    return dx, dbranch, dgamma, dweight, dbias


class Kernels(NamedTuple):
    """`forward` and `backward` of this module, or their like on another machine's kernels."""

    forward: Callable[..., tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]
    backward: Callable[..., tuple[torch.Tensor, ...]]


NATIVE = Kernels(forward, backward)


def residual_dtype(
    x: torch.Tensor, branch: torch.Tensor, gamma: torch.Tensor | None
) -> torch.dtype:
    """The dtype that torch gives x + gamma * branch."""
    dtype = x.dtype
    if branch.dtype != dtype:
        dtype = torch.promote_types(dtype, branch.dtype)
    if gamma is not None and gamma.dtype != dtype:
        dtype = torch.promote_types(dtype, gamma.dtype)
    return dtype


@overload
def dense(t: torch.Tensor) -> torch.Tensor: ...
@overload
def dense(t: torch.Tensor | None) -> torch.Tensor | None: ...
def dense(t: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor itself where its rows can be addressed by two strides, else a contiguous copy."""
    return t if t is None or t.is_contiguous() or _addressable(t) else t.contiguous()


def _addressable(t: torch.Tensor) -> bool:
    """Whether C is contiguous, and dimensions 1 to -2 are one dimension with one stride."""
    shape, strides = t.shape, t.stride()
    if t.ndim < 2 or (strides[-1] != 1 and shape[-1] != 1):
        return False
    return all(
        shape[i] == 1 or strides[i] == strides[i + 1] * shape[i + 1] for i in range(1, t.ndim - 2)
    )


def _rows(t: torch.Tensor | None, nc: int, c: int) -> tuple[int, int, int, int] | None:
    if t is None:
        return None
    if t.is_contiguous():
        return native.address(t), DTYPE_CODES[t.dtype], nc, c
    return native.address(t), DTYPE_CODES[t.dtype], t.stride(0), t.stride(-2)


def merged_shape(x: torch.Tensor) -> tuple[int, int, int, int]:
    """[B, H, W, C] to [B, ceil(H / 2), ceil(W / 2), 4 C]."""
    b, h, w, c = x.shape
    return b, (h + 1) // 2, (w + 1) // 2, 4 * c


def dense_map(t: torch.Tensor) -> torch.Tensor:
    """The map itself where its pixels are contiguous, else a contiguous copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _map(t: torch.Tensor | None) -> tuple[int, ...] | None:
    if t is None:
        return None
    outer, line, column, _ = t.stride()
    return native.address(t), DTYPE_CODES[t.dtype], outer, line, t.shape[1], t.shape[2], column


def _out_rows(
    t: torch.Tensor | None, shape: tuple[int, ...], nc: int, c: int
) -> tuple[int, int, int, int] | None:
    if t is not None and (t.shape != shape or not (t.is_contiguous() or _addressable(t))):
        raise InputValueError(
            f"output of shape {tuple(t.shape)} and strides {t.stride()}: expected shape"
            f" {tuple(shape)} with a contiguous last dimension"
        )
    return _rows(t, nc, c)


@overload
def vector(t: torch.Tensor) -> torch.Tensor: ...
@overload
def vector(t: torch.Tensor | None) -> torch.Tensor | None: ...
def vector(t: torch.Tensor | None) -> torch.Tensor | None:
    """The [C] tensor itself where it is contiguous, else a contiguous copy."""
    return t if t is None or t.is_contiguous() else t.contiguous()


def _float_vector(t: torch.Tensor | None) -> torch.Tensor | None:
    return t if t is None else t.to(torch.float32).contiguous()


def _channels(t: torch.Tensor | None) -> tuple[int, int] | None:
    return None if t is None else (native.address(t), DTYPE_CODES[t.dtype])


def _empty(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> torch.Tensor:
    return absent(like) if dtype is None else native.empty(shape, dtype, like.device)


def absent(like: torch.Tensor) -> torch.Tensor:
    """What an op returns in place of a tensor that is not there."""
    return torch.empty(0, dtype=torch.float32, device=like.device)


def filled(like: torch.Tensor, *outputs: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The outputs of an op, with an empty tensor in place of each that is not there."""
    return tuple([absent(like) if t is None else t for t in outputs])


def present(*pairs: tuple[torch.Tensor | None, torch.Tensor]) -> list[torch.Tensor | None]:
    """Of (input, gradient) pairs the gradients, None where the input was absent."""
    return [None if t is None else grad for t, grad in pairs]


def fake_stats(x: torch.Tensor, save_stats: bool, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Statistics of rows of x's shape, and of its dtype by default."""
    if not save_stats:
        return absent(x)
    dtype = torch.promote_types(dtype or x.dtype, torch.float32)
    return torch.empty((math.prod(x.shape[:-1]), 2), dtype=dtype, device=x.device)


def fake(
    x: torch.Tensor, out_dtype: torch.dtype | None, save_stats: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of layer_norm and rms_norm: contiguous, and the statistics."""
    return x.new_empty(x.shape, dtype=out_dtype or x.dtype), fake_stats(x, save_stats)


def backward_fake(
    x: torch.Tensor, *vectors: torch.Tensor | None, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, ...]:
    """Gradients of x (its dtype by default) and of [C] vectors, contiguous."""
    return x.new_empty(x.shape, dtype=dtype or x.dtype), *(
        absent(x) if v is None else v.new_empty(v.shape) for v in vectors
    )


def reference_stats(kind: int, x: torch.Tensor, eps: float) -> torch.Tensor:
    """The statistics that `forward` saves, in plain PyTorch."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_zeros(math.prod(x.shape[:-1]), 1)
    rows = rows.to(torch.promote_types(x.dtype, torch.float32))
    if kind == RMS:
        mean, var = torch.zeros_like(rows[:, 0]), rows.square().mean(-1)
    else:
        mean, var = rows.mean(-1), rows.var(-1, correction=0)
    return torch.stack((mean, torch.rsqrt(var + eps)), -1)
