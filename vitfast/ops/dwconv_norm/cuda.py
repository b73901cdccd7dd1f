"""dwconv_norm on the kernels of csrc/cuda/dwconv.cu.

Norms of up to 640 channels (256 behind kernels of 9 x 9 and 11 x 11) are part of the convolution.
Wider ones run on the kernels of the norms, through memory in float32, as the backward does: the
convolution again, the gradient through the norm, that of x (the convolution with its taps turned
round), and that of the taps, of which each block has sums of its own, added up in a fixed order.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.dwconv_norm.gpu import bias_of, of_wanted, taps_of
from vitfast.ops.dwconv_norm.reference import BackwardCall, Call
from vitfast.runtime import cuda
from vitfast.runtime.dispatch import Backend
from vitfast.runtime.kernel_calls import cdiv

SIZES = (3, 5, 7, 9, 11)
"""Of kernels, as high as wide."""
_NARROW = 640
"""Most threads of a block of the kernels with narrow strips: their launch bound."""
_GRADIENT_THREADS = 256
_PARTS = 512
"""Most blocks that sum the gradient of the taps, of each group of channels: several waves."""
_ROWS = 14
"""Lines of a strip: a strip reads k - 1 more, and maps of 14, 28 and 56 divide by it."""

_CONVOLVE = "7P3q16if"
"""`ConvolveArguments` of csrc/cuda/dwconv.cu, as `struct` describes it."""
_GRADIENT = "3P6q11i"
"""`GradientArguments`."""


def most_threads(size: int) -> int:
    """Of a block of the kernels with wide strips: their launch bound."""
    return 384 if size <= 7 else 256


def strip(size: int, narrow: bool = False) -> int:
    """Columns of a thread's strip: `wide` and `narrow` of csrc/cuda/dwconv.cu."""
    if narrow:
        return {3: 7, 5: 4, 7: 2}[size]
    return {9: 3, 11: 1}.get(size, 7)


def can_run(call: Call) -> list[str]:
    """Why the kernels cannot take this call; empty when they can."""
    why = cuda.reasons(call.x, call.weight, call.bias, call.norm_weight, call.norm_bias)
    for dtype in dict.fromkeys((call.dtype, call.out_dtype)):
        if dtype not in cuda.TYPES:
            why.append(f"{dtype} is not implemented, float32, bfloat16 and float16 are")
    if call.dtype != call.x.dtype != torch.float32:
        why.append(f"x in {call.x.dtype} is not rounded to {call.dtype}")
    height, width = call.weight.shape[2:]
    if height != width or height not in SIZES:
        why.append(f"a kernel of {height} x {width}; 3, 5, 7, 9 and 11 square are implemented")
    b, h, w, _ = call.x.shape
    if max(b, h, w) >= 2**31 // 64 or b * h * w >= 2**31:
        why.append("more than 2^31 pixels")
    return why


def _geometry(
    x: torch.Tensor, across: int, threads: int, *, together: bool
) -> tuple[int, int, int, int, int]:
    """Segments of a strip, its lines, strips of a block, warps of a strip, groups of channels.

    Args:
        together: whether a block must hold all channels of its strips.
    """
    _, h, w, c = x.shape
    rows = min(_ROWS, h)
    warps = threads // 32
    chunks = cdiv(c, 32) if together else min(cdiv(c, 32), warps)
    groups = cdiv(c, 32 * chunks)
    return cdiv(h, rows), rows, max(1, warps // chunks), chunks, groups


def _convolve(
    x: torch.Tensor, taps: torch.Tensor, size: int, out: torch.Tensor, *,
    bias: torch.Tensor | None = None, affine: tuple[torch.Tensor | None, ...] = (None, None),
    eps: float = 1.0, kind: int = norm_op.NONE, stats: torch.Tensor | None = None,
    flipped: bool = False, operand: torch.dtype,
) -> None:  # fmt: skip
    """out = norm(convolution of x [B, H, W, C] with taps [k k, C])."""
    x = norm_op.dense_map(x)
    b, h, w, c = x.shape
    together = kind != norm_op.NONE
    narrow = together and c > most_threads(size)
    across = strip(size, narrow)
    most = _NARROW if narrow else most_threads(size)
    segments, rows, slots, chunks, groups = _geometry(x, across, most, together=together)
    slots = min(slots, max(1, 16 // chunks))  # blocks of up to 512 threads, of which two fit
    threads = 32 * slots * chunks
    # Lanes of a pixel's norm: as many as leave each pixel of a line a place.
    lanes = min(32, 2 ** int(math.log2(max(1, threads // (slots * across)))))
    shared = 16 * slots + 2 * slots * across * (c + 8) * 4 if together else 0
    strips = b * segments * cdiv(w, across)
    weight, shift = affine
    like = weight if weight is not None else shift
    values = (
        x, taps, bias, weight, shift, out, stats, *x.stride()[:3], b, h, w, c, segments, rows,
        slots, chunks, groups, lanes, kind, cuda.TYPES[operand] if operand != x.dtype else 0,
        cuda.TYPES[taps.dtype], 0 if like is None else cuda.TYPES[like.dtype],
        cuda.TYPES[out.dtype], int(flipped), eps,
    )  # fmt: skip
    name = f"dwconv_{'narrow' if narrow else 'wide'}_{cuda.NAMES[x.dtype]}_{size}"
    blocks = cdiv(strips, slots) * groups
    cuda.launch(
        cuda.Launch(
            "dwconv", name, cuda.defines_of(x.dtype, SIZE=size), blocks, threads, shared,
            _CONVOLVE, values,
        ),
        x.device,
    )  # fmt: skip


def _affine(call: Call | BackwardCall) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The norm's weight and bias, contiguous and of one dtype."""
    weight, bias = norm_op.vector(call.norm_weight), norm_op.vector(call.norm_bias)
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        return weight.float(), bias.float()
    return weight, bias


def is_fused(size: int, channels: int) -> bool:
    """Whether the convolution's kernel norms so many channels itself."""
    return channels <= (_NARROW if size <= 7 else most_threads(size))


def _norms(x: torch.Tensor) -> ModuleType:
    """The norms' kernels for x's device."""
    if x.device.type == "cpu":
        return norm_op
    from vitfast.ops.common import norm_triton

    return norm_triton


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The result [B, H, W, C] and the rows' statistics [B * H * W, 2], or nothing."""
    x, dtype = call.x, call.dtype
    y = x.new_empty(x.shape, dtype=call.out_dtype)
    stats = norm_op.fake_stats(x, call.save_stats)
    if x.numel() == 0:
        return y, stats
    size, taps, bias = call.weight.shape[2], taps_of(call.weight, dtype), bias_of(call)
    kind = norm_op.NONE if call.norm is None else norm_op.KINDS[call.norm]
    if kind == norm_op.NONE or is_fused(size, x.shape[3]):
        _convolve(
            x, taps, size, y, bias=bias, affine=_affine(call), eps=call.eps, kind=kind,
            stats=stats if call.save_stats else None, operand=dtype,
        )  # fmt: skip
        return y, stats
    rows = x.new_empty(x.shape, dtype=torch.float32)
    _convolve(x, taps, size, rows, bias=bias, operand=dtype)
    weight, shift = _affine(call)
    _, normed, found = _norms(x).forward(
        kind, rows, weight=weight, bias=shift, eps=call.eps, out_dtype=call.out_dtype,
        save_stats=call.save_stats,
    )  # fmt: skip
    return normed, stats if found is None else found


def backward(call: BackwardCall) -> tuple[torch.Tensor, ...]:
    """Gradients of `INPUTS`, empty where not wanted; the convolution is computed again."""
    grad, x, weight, dtype = call.grad, call.x, call.weight, call.dtype
    if x.numel() == 0:
        return of_wanted(call, [None if t is None else t.new_zeros(t.shape) for t in call.inputs])
    size, taps = weight.shape[2], taps_of(weight, dtype)
    dx = dweight = dbias = dnorm_weight = dnorm_bias = None
    if call.norm is not None:
        rows = x.new_empty(x.shape, dtype=torch.float32)
        _convolve(x, taps, size, rows, bias=bias_of(call), operand=dtype)
        norm_weight, norm_bias = _affine(call)
        grad, _, _, dnorm_weight, dnorm_bias = _norms(x).backward(
            norm_op.KINDS[call.norm], grad, rows, call.stats, weight=norm_weight, bias=norm_bias,
            eps=call.eps,
        )  # fmt: skip
    wants_x, wants_weight, wants_bias = call.wanted[:3]
    if wants_x:
        dx = x.new_empty(x.shape)
        _convolve(grad, taps, size, dx, flipped=True, operand=grad.dtype)
    if wants_weight or wants_bias:
        sums = _gradients_of_taps(grad, x, size, dtype)
        dweight, dbias = sums[:-1].t().reshape(weight.shape), sums[-1]
    return of_wanted(call, (dx, dweight, dbias, dnorm_weight, dnorm_bias))


def _gradients_of_taps(
    grad: torch.Tensor, x: torch.Tensor, size: int, operand: torch.dtype
) -> torch.Tensor:
    """[k k + 1, C] in float64: of the taps, and below them of the bias."""
    grad, x = norm_op.dense_map(grad), norm_op.dense_map(x)
    b, h, w, c = x.shape
    sums = size * size + 1
    most = min(_GRADIENT_THREADS, cuda.MOST_SHARED // (4 * sums) // 32 * 32)
    across = strip(size)
    segments, rows, slots, chunks, groups = _geometry(x, across, most, together=False)
    threads = 32 * slots * chunks
    strips = b * segments * cdiv(w, across)
    parts = min(_PARTS, cdiv(strips, slots))
    found = x.new_empty((parts, sums, c), dtype=torch.float32)
    values: tuple[Any, ...] = (
        grad, x, found, *grad.stride()[:3], *x.stride()[:3], b, h, w, c, segments, rows, slots,
        chunks, groups, cuda.TYPES[operand] if operand != x.dtype else 0, cuda.TYPES[grad.dtype],
    )  # fmt: skip
    name = f"dwconv_taps_{cuda.NAMES[x.dtype]}_{size}"
    shared = 4 * sums * threads
    cuda.launch(
        cuda.Launch(
            "dwconv", name, cuda.defines_of(x.dtype, SIZE=size), parts * groups, threads, shared,
            _GRADIENT, values,
        ),
        x.device,
    )  # fmt: skip
    return found.sum(0, dtype=torch.float64)


def _unproven(call: Call, *, train: bool) -> str:
    return "no record shows that it is right on this GPU; backend='cuda' runs it"


BACKEND = Backend("cuda", forward, can_run, backward, cuda.available, _unproven)
