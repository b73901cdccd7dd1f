"""Triton kernels of the norms, residual_add and patch_merge: one pass over memory each.

Floors, in units of one tensor read or written: a norm and patch_merge 2, norm_add 3 (read x and
branch, write the sum), the backward of each 3, add_norm 4 (read x and branch, write residual and
normed), its backward 5 with both gradients coming in (read grad_normed, grad_residual,
residual; write dx, dbranch) and 6 with LayerScale (read branch). About 10 flops an element: memory
decides. Whole rows stand in registers; sums over rows go to one partial row a program, added up
afterwards in a fixed order, so that gradients are the same bits every time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common.norm import NONE
from vitfast.runtime.launches import Arch, Launch, Variant, arch_of, launch_of
from vitfast.runtime.triton import COUNTS, NAMES, guard

_PROGRAMS = 512
"""Most programs of a backward: several a multiprocessor of the largest GPUs."""


@triton.jit
def _offsets(row, n, outer, inner):
    """Where rows begin; 64 bits, since a tensor may hold more than 2^31 elements."""
    row = row.to(tl.int64)
    return (row // n) * outer + (row % n) * inner


@triton.jit
def _columns(c, BLOCK: tl.constexpr, MERGE: tl.constexpr):
    """The channel of each column of a tile, and whether it exists; with MERGE the tile's quarters
    are the pixels of a patch, each as wide as a power of two."""
    column = tl.arange(0, BLOCK)
    inside = column < c
    if MERGE:
        channel = column % (BLOCK // 4)
        inside = channel < c // 4
        column = (column // (BLOCK // 4)).to(tl.int64) * (c // 4) + channel
    return column, inside


@triton.jit
def _pixels(row, n, outer, inner, side, height, width, BLOCK: tl.constexpr):
    """Where the elements of 2x2 patches are in a map, and whether they are inside it."""
    row = row.to(tl.int64)
    across = (width + 1) // 2
    h, w = (row % n) // across * 2, (row % n) % across * 2
    quarter = (tl.arange(0, BLOCK) // (BLOCK // 4)).to(tl.int64)
    down, right = quarter % 2, quarter // 2
    at = ((row // n) * outer + h * inner + w * side)[:, None]
    at += (down * inner + right * side + tl.arange(0, BLOCK) % (BLOCK // 4))[None, :]
    exists = h[:, None] + down[None, :] < height
    return at, exists & (w[:, None] + right[None, :] < width)


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    x_ptr, branch_ptr, gamma_ptr, drop_ptr, weight_ptr, bias_ptr, base_ptr, scale_ptr,
    residual_ptr, normed_ptr, stats_ptr, rows, n, c, x_outer, x_inner, branch_outer, branch_inner,
    base_outer, base_inner, x_side, map_height, map_width, eps,
    KIND: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, MERGE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column, inside = _columns(c, BLOCK, MERGE)
    live = row < rows
    mask = live[:, None] & inside[None, :]
    out = row[:, None] * c + column[None, :]
    if MERGE:
        at, exists = _pixels(row, n, x_outer, x_inner, x_side, map_height, map_width, BLOCK)
        r = tl.load(x_ptr + at, mask=mask & exists, other=0.0).to(ACC)
    else:
        at = _offsets(row, n, x_outer, x_inner)[:, None] + column[None, :]
        r = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    if branch_ptr is not None:
        at = _offsets(row, n, branch_outer, branch_inner)[:, None] + column[None, :]
        b = tl.load(branch_ptr + at, mask=mask, other=0.0).to(ACC)
        if gamma_ptr is not None:
            b *= tl.load(gamma_ptr + column, mask=inside, other=0.0).to(ACC)[None, :]
        if drop_ptr is not None:
            b *= tl.load(drop_ptr + row // n, mask=live, other=0.0).to(ACC)[:, None]
        r += b
    if residual_ptr is not None:
        rounded = r.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + out, rounded, mask=mask)
        r = rounded.to(ACC)
    if KIND != 2:
        if KIND == 0:
            mean = tl.sum(r, axis=1) / c
            # What the mean's rounding left: the rows' sums then are as good as their elements.
            mean += tl.sum(tl.where(mask, r - mean[:, None], 0.0), axis=1) / c
            d = tl.where(mask, r - mean[:, None], 0.0)
        else:
            mean = tl.zeros([ROWS], ACC)
            d = r
        rstd = 1.0 / tl.sqrt(tl.sum(d * d, axis=1) / c + eps)
        y = d * rstd[:, None]
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(ACC)[None, :]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(ACC)[None, :]
        if scale_ptr is not None:
            y *= tl.load(scale_ptr + row // n, mask=live, other=0.0).to(ACC)[:, None]
        if base_ptr is not None:
            at = _offsets(row, n, base_outer, base_inner)[:, None] + column[None, :]
            y += tl.load(base_ptr + at, mask=mask, other=0.0).to(ACC)
        tl.store(normed_ptr + out, y.to(normed_ptr.dtype.element_ty), mask=mask)
        if stats_ptr is not None:
            tl.store(stats_ptr + row * 2, mean, mask=live)
            tl.store(stats_ptr + row * 2 + 1, rstd, mask=live)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    grad_ptr, grad_residual_ptr, residual_ptr, branch_ptr, gamma_ptr, drop_ptr, weight_ptr,
    scale_ptr, stats_ptr, dx_ptr, dbranch_ptr, dgamma_ptr, dweight_ptr, dbias_ptr, rows, n, c,
    grad_outer, grad_inner, grad_residual_outer, grad_residual_inner, residual_outer,
    residual_inner, branch_outer, branch_inner, residual_side, dx_outer, dx_inner, dx_side,
    map_height, map_width, eps,
    KIND: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, MERGE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    column, inside = _columns(c, BLOCK, MERGE)
    dgamma = tl.zeros([BLOCK], ACC)
    dweight = tl.zeros([BLOCK], ACC)
    dbias = tl.zeros([BLOCK], ACC)
    for block in range(first, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.arange(0, ROWS).to(tl.int64) + block * ROWS
        live = row < rows
        mask = live[:, None] & inside[None, :]
        dr = tl.zeros([ROWS, BLOCK], ACC)
        if grad_residual_ptr is not None:
            at = _offsets(row, n, grad_residual_outer, grad_residual_inner)[:, None]
            at += column[None, :]
            dr = tl.load(grad_residual_ptr + at, mask=mask, other=0.0).to(ACC)
        if KIND != 2:
            at = _offsets(row, n, grad_outer, grad_inner)[:, None] + column[None, :]
            g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(ACC)
            if scale_ptr is not None:
                g *= tl.load(scale_ptr + row // n, mask=live, other=0.0).to(ACC)[:, None]
            if MERGE:
                at, exists = _pixels(
                    row, n, residual_outer, residual_inner, residual_side, map_height, map_width,
                    BLOCK,
                )  # fmt: skip
                r = tl.load(residual_ptr + at, mask=mask & exists, other=0.0).to(ACC)
            else:
                at = _offsets(row, n, residual_outer, residual_inner)[:, None] + column[None, :]
                r = tl.load(residual_ptr + at, mask=mask, other=0.0).to(ACC)
            if stats_ptr is not None:
                mean = tl.load(stats_ptr + row * 2, mask=live, other=0.0).to(ACC)
                rstd = tl.load(stats_ptr + row * 2 + 1, mask=live, other=0.0).to(ACC)
                xhat = tl.where(mask, (r - mean[:, None]) * rstd[:, None], 0.0)
            else:
                if KIND == 0:
                    r = tl.where(mask, r - (tl.sum(r, axis=1) / c)[:, None], 0.0)
                rstd = 1.0 / tl.sqrt(tl.sum(r * r, axis=1) / c + eps)
                xhat = r * rstd[:, None]
            if dbias_ptr is not None:
                dbias += tl.sum(g, axis=0)
            if weight_ptr is not None:
                dweight += tl.sum(g * xhat, axis=0)
                g *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(ACC)[None, :]
            d = g - xhat * (tl.sum(g * xhat, axis=1) / c)[:, None]
            if KIND == 0:
                d -= (tl.sum(g, axis=1) / c)[:, None]
            dr += d * rstd[:, None]
        out = row[:, None] * c + column[None, :]
        if MERGE:
            at, exists = _pixels(row, n, dx_outer, dx_inner, dx_side, map_height, map_width, BLOCK)
            tl.store(dx_ptr + at, dr.to(dx_ptr.dtype.element_ty), mask=mask & exists)
        elif dx_ptr is not None:
            tl.store(dx_ptr + out, dr.to(dx_ptr.dtype.element_ty), mask=mask)
        if drop_ptr is not None:
            dr *= tl.load(drop_ptr + row // n, mask=live, other=0.0).to(ACC)[:, None]
        if dgamma_ptr is not None:
            at = _offsets(row, n, branch_outer, branch_inner)[:, None] + column[None, :]
            b = tl.load(branch_ptr + at, mask=mask, other=0.0).to(ACC)
            dgamma += tl.sum(tl.where(mask, dr * b, 0.0), axis=0)
        if dbranch_ptr is not None:
            if gamma_ptr is not None:
                dr *= tl.load(gamma_ptr + column, mask=inside, other=0.0).to(ACC)[None, :]
            tl.store(dbranch_ptr + out, dr.to(dbranch_ptr.dtype.element_ty), mask=mask)
    at = first.to(tl.int64) * c + column
    if dgamma_ptr is not None:
        tl.store(dgamma_ptr + at, dgamma, mask=inside)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + at, dweight, mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + at, dbias, mask=inside)


# ---- launches ------------------------------------------------------------------------------------


def launch_heuristic(arch: Arch, key: dict[str, Any]) -> Launch:
    """About 4K elements a program, 32 to 64 a thread of it; the backward holds several tensors."""
    block, backward = triton.next_power_of_2(key["c"]), key["pass"] == "backward"
    rows = max(1, min(16, (1024 if backward else 2048) // block))
    warps = max(1, min(16 if backward else 8, rows * block // (512 if backward else 1024)))
    if arch.warp_size == 64:
        warps = max(1, warps // 2)
    return Launch({"ROWS": rows}, warps, 1)


def _launch(x: torch.Tensor, which: str, c: int) -> Launch:
    key = {"pass": which, "c": c, "dtype": str(x.dtype).removeprefix("torch.")}
    return launch_of(f"norm.{which}", arch_of(x.device), key, launch_heuristic)


def _acc(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _steps(t: torch.Tensor | None, nc: int, c: int) -> tuple[int, int]:
    """Strides of the first dimension and of rows."""
    if t is None or t.is_contiguous():
        return nc, c
    return t.stride(0), t.stride(-2)


def _map_steps(t: torch.Tensor | None) -> tuple[int, int, int]:
    """Strides of images, of lines and of pixels."""
    return t.stride()[:3] if t is not None else (0, 0, 0)


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
    shape = norm_op.merged_shape(x) if merge else x.shape
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
    launch = _launch(x, "forward", c)
    x_outer, x_inner, x_side = _map_steps(x) if merge else (*_steps(x, nc, c), 0)
    with guard(x):
        forward_kernel[(triton.cdiv(rows, launch.blocks["ROWS"]),)](
            x, branch, gamma, drop_scale, weight, bias, base, normed_scale, residual, normed, stats,
            rows, nc // c, c, x_outer, x_inner, *_steps(branch, nc, c), *_steps(base, nc, c),
            x_side, *(x.shape[1:3] if merge else (0, 0)), eps,
            KIND=kind, BLOCK=triton.next_power_of_2(c), ACC=_acc(x.dtype), MERGE=merge,
            **launch.blocks, **launch.options(),
        )  # fmt: skip
    return residual, normed, stats


def backward(
    kind: int, grad_normed: torch.Tensor | None, residual: torch.Tensor,
    stats: torch.Tensor | None, *, grad_residual: torch.Tensor | None = None,
    branch: torch.Tensor | None = None, gamma: torch.Tensor | None = None,
    drop_scale: torch.Tensor | None = None, weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, eps: float = 1e-6, x_dtype: torch.dtype | None = None,
    x_wanted: bool = True, branch_dtype: torch.dtype | None = None,
    normed_scale: torch.Tensor | None = None, merge: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `vitfast.ops.common.norm.backward`."""
    if grad_normed is None:
        kind = NONE
    shape = norm_op.merged_shape(residual) if merge else residual.shape
    absent = norm_op.absent(residual)
    scale = branch if gamma is None else gamma
    dx = residual.new_empty(residual.shape, dtype=x_dtype or residual.dtype) if x_wanted else None
    dbranch = None if branch_dtype is None else residual.new_empty(shape, dtype=branch_dtype)
    vectors = (None if branch is None else scale, weight, bias)
    if residual.numel() == 0:
        sums = [absent if v is None else v.new_zeros(shape[-1:]) for v in vectors]
        return absent if dx is None else dx, absent if dbranch is None else dbranch, *sums
    c = shape[-1]
    b = shape[0] if residual.ndim > 1 else 1
    nc = math.prod(shape) // b
    rows = b * nc // c
    wide = torch.promote_types(residual.dtype, torch.float32)
    launch = _launch(residual, "backward", c)
    programs = min(triton.cdiv(rows, launch.blocks["ROWS"]), _PROGRAMS)
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
    with guard(residual):
        backward_kernel[(programs,)](
            grad_normed, grad_residual, source, branch, gamma_, drop_scale,
            weight_ if normed else None, normed_scale, stats, dx, dbranch, *partial, rows, nc // c,
            c, *_steps(grad_normed, nc, c), *_steps(grad_residual, nc, c), outer, inner,
            *_steps(branch, nc, c), side, *_map_steps(dx if merge else None),
            *(residual.shape[1:3] if merge else (0, 0)), eps,
            KIND=kind, BLOCK=triton.next_power_of_2(c), ACC=_acc(residual.dtype), MERGE=merge,
            **launch.blocks, **launch.options(),
        )  # fmt: skip
    sums = [
        absent if v is None else v.new_zeros(c) if p is None else _total(p, v.dtype)
        for v, p in zip(vectors, partial, strict=True)
    ]
    return absent if dx is None else dx, absent if dbranch is None else dbranch, *sums


def _total(partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The programs' sums added up; in float64, since as many rounding errors would meet here."""
    return partial.sum(0, dtype=torch.float64).to(dtype)


# ---- ahead of time -------------------------------------------------------------------------------

_WIDTHS = (384, 768, 1408)
_SUMS = ("stats", "dgamma", "dweight", "dbias", "drop", "scale")


def variants(
    arch: Arch, kind: int, present: dict[str, set[str]], widths: tuple[int, ...] = _WIDTHS,
    merge: bool = False,
) -> list[Variant]:  # fmt: skip
    """Every pass x width of real models x dtype; `present` names the tensors of each pass."""
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
                    "KIND": kind, "BLOCK": triton.next_power_of_2(c), "ACC": tl.float32,
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
