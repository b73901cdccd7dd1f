"""dwconv_norm on the kernels of triton_kernels.py: launches, and what is compiled for whom.

Rows of up to 512 channels are one block, and are normalised in registers: x is read and the result
written once. Wider ones go through memory in float32, as the backward does: the convolution again,
the gradient through the norm (the kernels of the norms), that of x (the convolution with its taps
flipped), and that of the taps, of which each program has sums of its own, added up afterwards in a
fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common import norm_triton
from vitfast.ops.dwconv_norm import triton_kernels as kernels
from vitfast.ops.dwconv_norm.gpu import bias_of, of_wanted, taps_of
from vitfast.ops.dwconv_norm.reference import BackwardCall, Call
from vitfast.runtime import kernel_calls
from vitfast.runtime.kernel_calls import cdiv, next_power_of_2
from vitfast.runtime.launches import Arch, Launch, Variant, arch_of, launch_of
from vitfast.runtime.triton import NAMES, guard

_WIDEST = 512
"""Most channels of a row that a program normalises in registers: with 8 pixels, for all of which it
reads a tap once, these are its 4K elements. Of wider rows it would hold fewer pixels, and read taps
more often for each. Chosen, not measured yet: 384 channels in a tile of 512 spill nowhere on the
twelve architectures of tests/gpu/resources.json."""
_PROGRAMS = 2048
"""About how many programs share the gradient of the taps: several waves of the largest GPUs (132 to
192 multiprocessors). Chosen, not measured yet."""


# ---- launches ------------------------------------------------------------------------------------


def forward_heuristic(arch: Arch, key: dict[str, Any]) -> Launch:
    """Whole rows where they are normalised, else 64 channels; 4K elements a program.

    64 channels are 128 bytes of a pixel in half precision, a line of cache; a thread has 16
    elements. Chosen, not measured yet: only sm_75 spills, at most 16 bytes a thread.
    """
    block = next_power_of_2(key["c"])
    block = max(block, 16) if key["whole"] else min(block, 64)
    pixels = max(1, min(64, 4096 // block))
    down = {1: 1, 2: 1, 4: 2, 8: 2, 16: 4, 32: 4, 64: 8}[pixels]
    warps = max(1, min(8, pixels * block // 512))
    if arch.warp_size == 64:
        warps = max(1, warps // 2)
    # Unrolled lines of taps load early, and hold registers for it.
    unroll = 4 if block < 512 else 2
    blocks = {"DOWN": down, "ACROSS": pixels // down, "BLOCK": block, "UNROLL": unroll}
    return Launch(blocks, warps, 1)


def taps_heuristic(arch: Arch, key: dict[str, Any]) -> Launch:
    """All taps of a 7 x 7 kernel by 32 channels, so that a gradient is read once for all of them.

    A stretch of 64 pixels bounds how many terms are added in order, and four of them make a part.
    A warp has up to 512 sums. Chosen, not measured yet: nothing spills with it.
    """
    taps = min(64, next_power_of_2(key["taps"]))
    block = min(next_power_of_2(key["c"]), 32)
    warps = max(1, min(4, taps * block // 512))
    if arch.warp_size == 64:
        warps = max(1, warps // 2)
    return Launch({"TAPS": taps, "BLOCK": block, "STRETCH": 64, "UNROLL": 2}, warps, 1)


_HEURISTICS = {"forward": forward_heuristic, "taps": taps_heuristic}


def _launch(which: str, device: torch.device, **key: Any) -> Launch:
    return launch_of(f"dwconv_norm.{which}", arch_of(device), key, _HEURISTICS[which])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


_TYPES = {
    torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32,
    torch.float64: tl.float64,
}  # fmt: skip


def _convolve(
    x: torch.Tensor, taps: torch.Tensor, kernel: tuple[int, ...], out: torch.Tensor, *,
    bias: torch.Tensor | None = None, affine: tuple[torch.Tensor | None, ...] = (None, None),
    eps: float = 1.0, kind: int = norm_op.NONE, stats: torch.Tensor | None = None,
    flipped: bool = False, operand: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """out = norm(convolution of x [B, H, W, C] with taps [k k', C])."""
    x = norm_op.dense_map(x)
    b, h, w, c = x.shape
    config = _launch("forward", x.device, c=c, whole=int(kind != norm_op.NONE))
    tiles = cdiv(h, config.blocks["DOWN"]) * cdiv(w, config.blocks["ACROSS"])
    programs = b * tiles * cdiv(c, config.blocks["BLOCK"])
    args = (x, taps, bias, *affine, out, stats, h, w, c, *x.stride()[:3], eps)
    constants = {
        "KIND": kind, "HEIGHT": kernel[0], "WIDTH": kernel[1], "FLIPPED": flipped,
        "OPERAND": _TYPES[operand], "ACC": _TYPES[_wide(x.dtype)],
    }  # fmt: skip
    kernel_calls.launch(kernels.forward_kernel, programs, args, constants, config)
    return out


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The result [B, H, W, C] and the rows' statistics [B * H * W, 2], or nothing."""
    x, dtype = call.x, call.dtype
    y = x.new_empty(x.shape, dtype=call.out_dtype)
    stats = norm_op.fake_stats(x, call.save_stats)
    if x.numel() == 0:
        return y, stats
    kind = norm_op.NONE if call.norm is None else norm_op.KINDS[call.norm]
    kernel, taps, bias = call.weight.shape[2:], taps_of(call.weight, dtype), bias_of(call)
    affine = (norm_op.vector(call.norm_weight), norm_op.vector(call.norm_bias))
    with guard(x):
        if kind == norm_op.NONE or x.shape[3] <= _WIDEST:
            _convolve(
                x, taps, kernel, y, bias=bias, affine=affine, eps=call.eps, kind=kind,
                stats=stats if call.save_stats else None, operand=dtype,
            )  # fmt: skip
            return y, stats
        rows = x.new_empty(x.shape, dtype=_wide(x.dtype))
        _convolve(x, taps, kernel, rows, bias=bias, operand=dtype)
    _, normed, found = norm_triton.forward(
        kind, rows, weight=call.norm_weight, bias=call.norm_bias, eps=call.eps,
        out_dtype=call.out_dtype, save_stats=call.save_stats,
    )  # fmt: skip
    assert normed is not None  # since there is a norm
    return normed, stats if found is None else found


def backward(call: BackwardCall) -> tuple[torch.Tensor, ...]:
    """Gradients of `INPUTS`, empty where not wanted; the convolution is computed again."""
    grad, x, weight, dtype = call.grad, call.x, call.weight, call.dtype
    if x.numel() == 0:
        return of_wanted(call, [None if t is None else t.new_zeros(t.shape) for t in call.inputs])
    kernel, taps = weight.shape[2:], taps_of(weight, dtype)
    dx = dweight = dbias = dnorm_weight = dnorm_bias = None
    with guard(x):
        if call.norm is not None:
            rows = x.new_empty(x.shape, dtype=_wide(x.dtype))
            _convolve(x, taps, kernel, rows, bias=bias_of(call), operand=dtype)
            grad, _, _, dnorm_weight, dnorm_bias = norm_triton.backward(
                norm_op.KINDS[call.norm], grad, rows, call.stats, weight=call.norm_weight,
                bias=call.norm_bias, eps=call.eps,
            )  # fmt: skip
        wants_x, wants_weight, wants_bias = call.wanted[:3]
        if wants_x:
            dx = x.new_empty(x.shape)
            _convolve(grad, taps, kernel, dx, flipped=True, operand=grad.dtype)
        if wants_weight or wants_bias:
            dweight, dbias = _gradients_of_taps(grad, x, kernel, dtype)
            dweight = dweight.t().reshape(weight.shape)
    return of_wanted(call, (dx, dweight, dbias, dnorm_weight, dnorm_bias))


def _gradients_of_taps(
    grad: torch.Tensor, x: torch.Tensor, kernel: tuple[int, ...], operand: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """[k k', C] and [C], in float64."""
    grad, x = norm_op.dense_map(grad), norm_op.dense_map(x)
    b, h, w, c = x.shape
    taps, rows = kernel[0] * kernel[1], b * h * w
    config = _launch("taps", x.device, c=c, taps=taps)
    groups = cdiv(taps, config.blocks["TAPS"]) * cdiv(c, config.blocks["BLOCK"])
    parts = max(1, min(_PROGRAMS // groups, cdiv(rows, 4 * config.blocks["STRETCH"])))
    per = cdiv(rows, parts)
    parts = cdiv(rows, per)
    wide = _wide(x.dtype)
    dweight = x.new_empty((parts, taps, c), dtype=wide)
    dbias = x.new_empty((parts, c), dtype=wide)
    args = (grad, x, dweight, dbias, rows, h, w, c, per, *grad.stride()[:3], *x.stride()[:3])
    constants = {
        "HEIGHT": kernel[0], "WIDTH": kernel[1], "OPERAND": _TYPES[operand], "ACC": _TYPES[wide],
    }  # fmt: skip
    kernel_calls.launch(kernels.taps_kernel, parts * groups, args, constants, config)
    return dweight.sum(0, dtype=torch.float64), dbias.sum(0, dtype=torch.float64)


# ---- ahead of time -------------------------------------------------------------------------------


def variants(arch: Arch) -> list[Variant]:
    """The 7 x 7 kernel: whole rows of ConvNeXt's widths, blocks of wider ones, both gradients."""
    found = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for c in (40, 96, 192, 384):
            found.append(
                _conv_variant(arch, f"forward-c{c}", c, norm_op.LAYER, dtype, dtype, dtype)
            )
        wide = torch.float32
        found.append(_conv_variant(arch, "rows", 768, norm_op.NONE, dtype, dtype, wide))
        found.append(_conv_variant(arch, "dx", 768, norm_op.NONE, wide, dtype, dtype))
        launch = launch_of("dwconv_norm.taps", arch, {"c": 96, "taps": 49}, taps_heuristic)
        constants = {
            "HEIGHT": 7, "WIDTH": 7, "OPERAND": _TYPES[dtype], "ACC": tl.float32,
            **launch.blocks,
        }  # fmt: skip
        signature = _signature(kernels.taps_kernel, constants, {"x": dtype})
        found.append(
            Variant(f"dweight-{NAMES[dtype]}", kernels.taps_kernel, signature, constants, launch)
        )
    return found


def _conv_variant(
    arch: Arch, name: str, c: int, kind: int, x: torch.dtype, weight: torch.dtype, y: torch.dtype
) -> Variant:
    whole = int(kind != norm_op.NONE)
    launch = launch_of("dwconv_norm.forward", arch, {"c": c, "whole": whole}, forward_heuristic)
    constants: dict[str, Any] = {
        "KIND": kind, "HEIGHT": 7, "WIDTH": 7, "FLIPPED": name == "dx", "ACC": tl.float32,
        "OPERAND": _TYPES[x], **launch.blocks,
    }  # fmt: skip
    if not whole:
        constants |= dict.fromkeys(("norm_weight_ptr", "norm_bias_ptr", "stats_ptr"))
    if name == "dx":
        constants["bias_ptr"] = None
    vectors = dict.fromkeys(("weight", "bias", "norm_weight", "norm_bias"), weight)
    signature = _signature(kernels.forward_kernel, constants, {"x": x, "y": y, **vectors})
    return Variant(f"{name}-{NAMES[weight]}", kernels.forward_kernel, signature, constants, launch)


def _signature(
    kernel: Any, constants: dict[str, Any], dtypes: dict[str, torch.dtype]
) -> dict[str, str]:
    """Pointers are of float32 where `dtypes` names no other."""
    return {
        name: f"*{NAMES[dtypes.get(name.removesuffix('_ptr'), torch.float32)]}"
        if name.endswith("_ptr") else "fp32" if name == "eps" else "i32"
        for name in kernel.arg_names
        if name not in constants or name.endswith("_ptr")
    }  # fmt: skip
