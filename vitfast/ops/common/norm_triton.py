"""Launches of the norms' Triton kernels, and their variants for ahead-of-time compilation."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common.norm import NONE
from vitfast.ops.common.norm_triton_kernels import backward_kernel, forward_kernel
from vitfast.runtime import kernel_calls
from vitfast.runtime.kernel_calls import cdiv, next_power_of_2
from vitfast.runtime.launches import Arch, Launch, Variant, arch_of, launch_of
from vitfast.runtime.triton import NAMES, guard

_PROGRAMS = 512
"""Most programs of a backward: each stores a row of partial sums [C] a parameter, which are added
up afterwards, so that there should be few; yet more than one for each of the 304 compute units of
the largest GPU (gfx942) and 3 for each of the 148 of sm_100. Derived, not measured."""
_MOST_ROWS = 16
"""Most rows of a program, for narrow C: a tile of C = 128 fills the forward's 2048 elements."""
_FORWARD, _BACKWARD = (2048, 32, 8), (1024, 16, 16)
"""Elements of a tile [ROWS, BLOCK], those of a thread, and most warps (of 32 threads).

Derived from the 255 registers of a thread: the forward holds two tiles (a row and its product with
the weights), 2 x 32 registers, the backward six (gradient, row, their product, three sums), 6 x 16.
Rows of more than 8192 channels have more elements a thread (see `_WIDEST` in norm.py). Compiled
for sm_80, add_norm at C = 1408 takes at most 78 and 159 (tests/gpu/resources.json).
"""


def launch_heuristic(arch: Arch, key: dict[str, Any]) -> Launch:
    """Whole rows, as many as fill a tile, and warps for it; key has "pass" and "c"."""
    elements, of_thread, most = _BACKWARD if key["pass"] == "backward" else _FORWARD
    block = next_power_of_2(key["c"])
    rows = max(1, min(_MOST_ROWS, elements // block))
    warps = max(1, min(most, rows * block // (32 * of_thread)))
    if arch.warp_size == 64:
        warps = max(1, warps // 2)
    return Launch({"ROWS": rows}, warps, 1)


def _launch(x: torch.Tensor, which: str, c: int) -> Launch:
    """The config of a pass, "forward" or "backward", over rows of c channels in x's dtype."""
    key: dict[str, int | str] = {
        "pass": which, "c": c, "dtype": str(x.dtype).removeprefix("torch."),
    }  # fmt: skip
    return launch_of(f"norm.{which}", arch_of(x.device), key, launch_heuristic)


def _acc(dtype: torch.dtype) -> Any:
    """Triton's dtype of statistics and sums."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def _steps(t: torch.Tensor | None, nc: int, c: int) -> tuple[int, int]:
    """Strides of the first dimension and of rows; nc is the first one's of a contiguous tensor."""
    if t is None or t.is_contiguous():
        return nc, c
    return t.stride(0), t.stride(-2)


def _map_steps(t: torch.Tensor | None) -> tuple[int, int, int]:
    """Strides of images, of lines and of pixels of a map [B, H, W, C]."""
    if t is None:
        return 0, 0, 0
    image, line, pixel, _ = t.stride()
    return image, line, pixel


def forward(
    kind: int, x: torch.Tensor, *, branch: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None, drop_scale: torch.Tensor | None = None,
    weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-6,
    out_dtype: torch.dtype | None = None, save_stats: bool = False,
    base: torch.Tensor | None = None, normed_scale: torch.Tensor | None = None,
    merge: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """As `vitfast.ops.common.norm.forward`."""
    residual = normed = stats = None
    shape: tuple[int, ...] = norm_op.merged_shape(x) if merge else x.shape
    if branch is not None or kind == NONE:
        dtype = out_dtype or x.dtype if branch is None else norm_op.residual_dtype(x, branch, gamma)
        residual = x.new_empty(shape, dtype=dtype)
    if kind != NONE:
        dtype = out_dtype or (x if residual is None else residual).dtype
        normed = x.new_empty(shape, dtype=dtype)
        if save_stats:
            stats = norm_op.fake_stats(normed, True, x.dtype)
    if x.numel() == 0:
        return residual, normed, stats
    c = shape[-1]
    b = shape[0] if x.ndim > 1 else 1
    nc = math.prod(shape) // b
    x = norm_op.dense_map(x) if merge else norm_op.dense(x)
    branch, base = norm_op.dense(branch), norm_op.dense(base)
    gamma, weight, bias, drop_scale, normed_scale = map(
        norm_op.vector, (gamma, weight, bias, drop_scale, normed_scale)
    )
    rows = b * nc // c
    config = _launch(x, "forward", c)
    x_outer, x_inner, x_side = _map_steps(x) if merge else (*_steps(x, nc, c), 0)
    args = (
        x, branch, gamma, drop_scale, weight, bias, base, normed_scale, residual, normed, stats,
        rows, nc // c, c, x_outer, x_inner, *_steps(branch, nc, c), *_steps(base, nc, c),
        x_side, *(x.shape[1:3] if merge else (0, 0)), eps,
    )  # fmt: skip
    constants = {
        "KIND": kind, "BLOCK": next_power_of_2(c), "ACC": _acc(x.dtype), "MERGE": merge,
    }  # fmt: skip
    with guard(x):
        kernel_calls.launch(
            forward_kernel, cdiv(rows, config.blocks["ROWS"]), args, constants, config
        )
    return residual, normed, stats


def backward(
    kind: int, grad_normed: torch.Tensor | None, residual: torch.Tensor,
    stats: torch.Tensor | None, *, grad_residual: torch.Tensor | None = None,
    branch: torch.Tensor | None = None, gamma: torch.Tensor | None = None,
    drop_scale: torch.Tensor | None = None, weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, eps: float = 1e-6, x_dtype: torch.dtype | None = None,
    x_wanted: bool = True, branch_dtype: torch.dtype | None = None,
    normed_scale: torch.Tensor | None = None, merge: bool = False,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """As `vitfast.ops.common.norm.backward`."""
    if grad_normed is None:
        kind = NONE
    shape: tuple[int, ...] = norm_op.merged_shape(residual) if merge else residual.shape
    dx = residual.new_empty(residual.shape, dtype=x_dtype or residual.dtype) if x_wanted else None
    dbranch = None if branch_dtype is None else residual.new_empty(shape, dtype=branch_dtype)
    scale = branch if branch is None or gamma is None else gamma
    vectors = (scale, weight, bias)
    if residual.numel() == 0:
        sums = [None if v is None else v.new_zeros(shape[-1:]) for v in vectors]
        return norm_op.filled(residual, dx, dbranch, *sums)
    c = shape[-1]
    b = shape[0] if residual.ndim > 1 else 1
    nc = math.prod(shape) // b
    rows = b * nc // c
    wide = torch.promote_types(residual.dtype, torch.float32)
    config = _launch(residual, "backward", c)
    programs = min(cdiv(rows, config.blocks["ROWS"]), _PROGRAMS)
    normed = kind != NONE
    partial = [
        residual.new_empty((programs, c), dtype=wide) if v is not None and wanted else None
        for v, wanted in zip(vectors, (True, normed, normed), strict=True)
    ]
    grad_normed, grad_residual = norm_op.dense(grad_normed), norm_op.dense(grad_residual)
    source = (norm_op.dense_map if merge else norm_op.dense)(residual) if normed else None
    stats = stats if normed and stats is not None and stats.numel() else None
    branch = norm_op.dense(branch)
    gamma_, weight_, drop_scale, normed_scale = map(
        norm_op.vector, (gamma, weight, drop_scale, normed_scale)
    )
    outer, inner, side = _map_steps(source) if merge else (*_steps(source, nc, c), 0)
    args = (
        grad_normed, grad_residual, source, branch, gamma_, drop_scale,
        weight_ if normed else None, normed_scale, stats, dx, dbranch, *partial, rows, nc // c,
        c, *_steps(grad_normed, nc, c), *_steps(grad_residual, nc, c), outer, inner,
        *_steps(branch, nc, c), side, *_map_steps(dx if merge else None),
        *(residual.shape[1:3] if merge else (0, 0)), eps,
    )  # fmt: skip
    constants = {
        "KIND": kind, "BLOCK": next_power_of_2(c), "ACC": _acc(residual.dtype), "MERGE": merge,
    }  # fmt: skip
    with guard(residual):
        kernel_calls.launch(backward_kernel, programs, args, constants, config)
    sums = [
        None if v is None else v.new_zeros(c) if p is None else _total(p, v.dtype)
        for v, p in zip(vectors, partial, strict=True)
    ]
    return norm_op.filled(residual, dx, dbranch, *sums)


def _total(partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The programs' sums added up; in float64, since as many rounding errors would meet here."""
    return partial.sum(0, dtype=torch.float64).to(dtype)


# ---- ahead of time -------------------------------------------------------------------------------

KERNELS = norm_op.Kernels(forward, backward)
_WIDTHS = (384, 768, 1408)
"""C of ViT-S, ViT-B and ViT-g: blocks of 512, 1024 and 2048 channels."""
_SUMS = ("stats", "dgamma", "dweight", "dbias", "drop", "scale")
"""What kernels hold in float32, whatever the dtype of x is."""


def variants(
    arch: Arch, kind: int, present: dict[str, set[str]], widths: tuple[int, ...] = _WIDTHS,
    merge: bool = False,
) -> list[Variant]:  # fmt: skip
    """Every pass x width of real models x dtype.

    Args:
        kind: LAYER, RMS or NONE.
        present: by pass, "forward" and "backward": the kernel's pointers that are not None, without
            their "_ptr".
        widths: channels of a row.
        merge: whether rows are the 2x2 patches of a map.
    """
    found = []
    for which, kernel in (("forward", forward_kernel), ("backward", backward_kernel)):
        for c in widths:
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                launch = launch_of(
                    f"norm.{which}", arch,
                    {"pass": which, "c": c, "dtype": str(dtype).removeprefix("torch.")},
                    launch_heuristic,
                )  # fmt: skip
                constants: dict[str, Any] = {
                    "KIND": kind, "BLOCK": next_power_of_2(c), "ACC": tl.float32,
                    "MERGE": merge, **launch.blocks,
                }  # fmt: skip
                signature = {}
                for name in kernel.arg_names:
                    tensor = name.removesuffix("_ptr")
                    if name.endswith("_ptr"):
                        element = "fp32" if tensor in _SUMS else NAMES[dtype]
                        signature[name] = f"*{element}"
                        if tensor not in present[which]:
                            constants[name] = None
                    elif name not in constants:
                        signature[name] = "fp32" if name == "eps" else "i32"
                name = f"{which}-c{c}-{NAMES[dtype]}"
                found.append(Variant(name, kernel, signature, constants, launch))
    return found
