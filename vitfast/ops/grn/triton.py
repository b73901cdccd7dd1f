"""Triton kernels of grn: sums over positions, n of an image, and the result, each a launch.

Floors, in tensors read or written: forward 3 (read x twice, write the result), backward 5 (read x
and the gradient twice, write x's). Sums over positions go to one partial row a program, whose
positions depend on the image's size alone: the same bits every time, whatever else is in the batch.
Maps with contiguous channels and planar ones (NCHW) differ in the strides and the tile's shape.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vitfast.ops.common import norm as norm_op
from vitfast.ops.grn.layout import empty, of_layout, planar_or_dense, sizes, steps
from vitfast.ops.grn.reference import promoted
from vitfast.runtime.launches import Arch, Launch, Variant, arch_of, launch_of
from vitfast.runtime.triton import COUNTS, NAMES, guard

_PARTS = 256
"""Most parts of an image, each with a sum of its own."""


@triton.jit
def _tile(row, column, inner, step):
    """Where a tile's elements are; 64 bits, since a tensor may hold more than 2^31 elements."""
    return row.to(tl.int64)[:, None] * inner + column.to(tl.int64)[None, :] * step


@triton.jit
def _over_rows(tile, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over a tile's rows; of many in two steps, since a sum in order would lose accuracy."""
    if ROWS <= 32:
        return tl.sum(tile, axis=0)
    return tl.sum(tl.sum(tl.reshape(tile, [ROWS // 8, 8, BLOCK]), axis=0), axis=0)


@triton.jit(do_not_specialize=COUNTS)
def sums_kernel(
    grad_ptr, x_ptr, products_ptr, plain_ptr, n, c, per, grad_outer, grad_inner, grad_step,
    x_outer, x_inner, x_step, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums over one part of an image: of x^2, or with a gradient of grad * x and of grad."""
    blocks, parts = tl.cdiv(c, BLOCK), tl.cdiv(n, per)
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks % parts
    b = (tl.program_id(0) // blocks // parts).to(tl.int64)
    column = block * BLOCK + tl.arange(0, BLOCK)
    end = tl.minimum((part + 1) * per, n)
    products = tl.zeros([ROWS, BLOCK], ACC)
    plain = tl.zeros([ROWS, BLOCK], ACC)
    for first in range(part * per, end, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & (column < c)[None, :]
        at = b * x_outer + _tile(row, column, x_inner, x_step)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
        if grad_ptr is None:
            products += x * x
        else:
            at = b * grad_outer + _tile(row, column, grad_inner, grad_step)
            g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(ACC)
            products += g * x
            plain += g
    to = (b * parts + part) * c + column
    tl.store(products_ptr + to, _over_rows(products, ROWS, BLOCK), mask=column < c)
    if grad_ptr is not None:
        tl.store(plain_ptr + to, _over_rows(plain, ROWS, BLOCK), mask=column < c)


@triton.jit
def _total(
    partial_ptr, b, parts, column, c, PARTS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """An image's partial sums of some channels added up, in order."""
    total = tl.zeros([PARTS, BLOCK], ACC)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        at = (b * parts + part)[:, None] * c + column[None, :]
        mask = (part < parts)[:, None] & (column < c)[None, :]
        total += tl.load(partial_ptr + at, mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=COUNTS)
def scale_kernel(
    squares_ptr, weight_ptr, norms_ptr, scale_ptr, per_image, c, eps,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """An image's norms, and scale = weight * n."""
    b = tl.program_id(0).to(tl.int64)
    norms = tl.zeros([BLOCK], ACC)
    for first in range(0, c, BLOCK):
        column = first + tl.arange(0, BLOCK)
        g = tl.sqrt(_total(squares_ptr, b, per_image, column, c, PARTS, BLOCK, ACC))
        norms += g
        tl.store(norms_ptr + b * c + column, g, mask=column < c)
    m = tl.sum(norms) / c + eps
    for first in range(0, c, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < c
        g = tl.sqrt(_total(squares_ptr, b, per_image, column, c, PARTS, BLOCK, ACC))
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(ACC)
        tl.store(scale_ptr + b * c + column, weight * (g / m), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def factors_kernel(
    products_ptr, plain_ptr, weight_ptr, norms_ptr, scale_ptr, along_ptr, dweight_ptr, dbias_ptr,
    per_image, c, eps, PARTS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """In an image, the factors of the gradient and of x in dx, and what it adds to dweight, dbias.

    With P = sum of grad * x, m = mean of g + eps, dn = weight P: x's factor is
    (dn - mean of (dn g) / m) / (m g).
    """
    b = tl.program_id(0).to(tl.int64)
    norms = tl.zeros([BLOCK], ACC)
    along_norms = tl.zeros([BLOCK], ACC)
    for first in range(0, c, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < c
        g = tl.load(norms_ptr + b * c + column, mask=inside, other=0.0)
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(ACC)
        norms += g
        products = _total(products_ptr, b, per_image, column, c, PARTS, BLOCK, ACC)
        along_norms += weight * products * g
    m = tl.sum(norms) / c + eps
    shared = tl.sum(along_norms) / c / m
    for first in range(0, c, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside, at = column < c, b * c + column
        plain = _total(plain_ptr, b, per_image, column, c, PARTS, BLOCK, ACC)
        tl.store(dbias_ptr + at, plain, mask=inside)
        products = _total(products_ptr, b, per_image, column, c, PARTS, BLOCK, ACC)
        g = tl.load(norms_ptr + at, mask=inside, other=0.0)
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(ACC)
        n = g / m
        tl.store(dweight_ptr + at, n * products, mask=inside)
        tl.store(scale_ptr + at, weight * n, mask=inside)
        # A channel without energy has no direction to go along: its x is zero too.
        along = (weight * products - shared) / m / tl.where(g == 0.0, 1.0, g)
        tl.store(along_ptr + at, along, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    x_ptr, scale_ptr, bias_ptr, y_ptr, n, c, x_outer, x_inner, x_step, y_outer, y_inner, y_step,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = x + (x * scale + bias)."""
    blocks, tiles = tl.cdiv(c, BLOCK), tl.cdiv(n, ROWS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0) // blocks % tiles * ROWS + tl.arange(0, ROWS)
    b = (tl.program_id(0) // blocks // tiles).to(tl.int64)
    inside = column < c
    mask = (row < n)[:, None] & inside[None, :]
    at = b * x_outer + _tile(row, column, x_inner, x_step)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    scale = tl.load(scale_ptr + b * c + column, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(ACC)
    y = x + (x * scale[None, :] + bias[None, :])
    at = b * y_outer + _tile(row, column, y_inner, y_step)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    grad_ptr, x_ptr, scale_ptr, along_ptr, dx_ptr, n, c, grad_outer, grad_inner, grad_step,
    x_outer, x_inner, x_step, dx_outer, dx_inner, dx_step,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx = grad + (grad * scale + x * along)."""
    blocks, tiles = tl.cdiv(c, BLOCK), tl.cdiv(n, ROWS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0) // blocks % tiles * ROWS + tl.arange(0, ROWS)
    b = (tl.program_id(0) // blocks // tiles).to(tl.int64)
    inside = column < c
    mask = (row < n)[:, None] & inside[None, :]
    at = b * x_outer + _tile(row, column, x_inner, x_step)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    at = b * grad_outer + _tile(row, column, grad_inner, grad_step)
    g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(ACC)
    scale = tl.load(scale_ptr + b * c + column, mask=inside, other=0.0)
    along = tl.load(along_ptr + b * c + column, mask=inside, other=0.0)
    dx = g + (g * scale[None, :] + x * along[None, :])
    at = b * dx_outer + _tile(row, column, dx_inner, dx_step)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


# ---- launches ------------------------------------------------------------------------------------


def tile_heuristic(arch: Arch, key: dict[str, Any]) -> Launch:
    """2K elements a program, the long side where memory is contiguous."""
    if key["planar"]:
        return Launch({"ROWS": 128, "BLOCK": 16}, 4, 1)
    block = min(triton.next_power_of_2(key["c"]), 128)
    return Launch({"ROWS": 2048 // max(block, 16), "BLOCK": block}, 4, 1)


def sums_heuristic(arch: Arch, key: dict[str, Any]) -> Launch:
    """The same; in half precision by more threads, which read 16 bytes each."""
    half = arch.warp_size == 32 and key["dtype"] in ("float16", "bfloat16")
    return Launch(tile_heuristic(arch, key).blocks, 8 if half else 4, 1)


def image_heuristic(arch: Arch, key: dict[str, Any]) -> Launch:
    """All channels of an image in one program, 1024 at a time."""
    block = min(triton.next_power_of_2(key["c"]), 1024)
    return Launch({"PARTS": 4, "BLOCK": block}, max(1, min(8, block // 128)), 1)


def _launch(which: str, x: torch.Tensor, planar: bool) -> Launch:
    key = _key(which, x.shape[-1], planar, x.dtype)
    return launch_of(f"grn.{which}", arch_of(x.device), key, _HEURISTICS[which])


def _key(which: str, c: int, planar: bool, dtype: torch.dtype) -> dict[str, int | str]:
    if which in ("scale", "factors"):
        return {"c": c}
    return {"c": c, "planar": int(planar), "dtype": str(dtype).removeprefix("torch.")}


_HEURISTICS = {
    "sums": sums_heuristic, "forward": tile_heuristic, "backward": tile_heuristic,
    "scale": image_heuristic, "factors": image_heuristic,
}  # fmt: skip


def _sums(grad: torch.Tensor | None, x: torch.Tensor, planar: bool) -> list[torch.Tensor | None]:
    """Partial sums [B, parts, C]."""
    b, n, c = sizes(x)
    launch = _launch("sums", x, planar)
    rows = launch.blocks["ROWS"]
    per = max(4 * rows, triton.cdiv(triton.cdiv(n, _PARTS), rows) * rows)
    parts = triton.cdiv(n, per)
    products = x.new_empty((b, parts, c), dtype=_wide(x.dtype))
    plain = None if grad is None else torch.empty_like(products)
    grid = (b * parts * triton.cdiv(c, launch.blocks["BLOCK"]),)
    sums_kernel[grid](
        grad, x, products, plain, n, c, per, *((0, 0, 0) if grad is None else steps(grad, planar)),
        *steps(x, planar), ACC=_acc(x.dtype), **launch.blocks, **launch.options(),
    )  # fmt: skip
    return [products, plain]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _acc(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def forward(x, weight, bias, eps, out_dtype):
    b, n, c = sizes(x)
    y = empty(x, out_dtype or promoted(x, weight, bias))
    norms = x.new_empty((b, c), dtype=_wide(x.dtype))
    if x.numel() == 0:
        return y, norms.zero_()
    planar, x = planar_or_dense(x)
    weight, bias = norm_op.vector(weight), norm_op.vector(bias)
    scale = torch.empty_like(norms)
    image, tile = _launch("scale", x, planar), _launch("forward", x, planar)
    tiles = triton.cdiv(n, tile.blocks["ROWS"]) * triton.cdiv(c, tile.blocks["BLOCK"])
    with guard(x):
        squares, _ = _sums(None, x, planar)
        scale_kernel[(b,)](
            squares, weight, norms, scale, squares.shape[1], c, eps,
            ACC=_acc(x.dtype), **image.blocks, **image.options(),
        )  # fmt: skip
        forward_kernel[(b * tiles,)](
            x, scale, bias, y, n, c, *steps(x, planar), *steps(y, planar),
            ACC=_acc(x.dtype), **tile.blocks, **tile.options(),
        )  # fmt: skip
    return y, norms


def backward(grad, x, weight, bias, eps, norms):
    b, n, c = sizes(x)
    dx = empty(x, x.dtype)
    if x.numel() == 0:
        return dx, weight.new_zeros(c), bias.new_zeros(c)
    planar, x = planar_or_dense(x)
    grad, weight_ = of_layout(grad, planar), norm_op.vector(weight)
    scale, along, dweight, dbias = (torch.empty_like(norms) for _ in range(4))
    image, tile = _launch("factors", x, planar), _launch("backward", x, planar)
    tiles = triton.cdiv(n, tile.blocks["ROWS"]) * triton.cdiv(c, tile.blocks["BLOCK"])
    with guard(x):
        products, plain = _sums(grad, x, planar)
        factors_kernel[(b,)](
            products, plain, weight_, norms, scale, along, dweight, dbias, products.shape[1], c,
            eps, ACC=_acc(x.dtype), **image.blocks, **image.options(),
        )  # fmt: skip
        backward_kernel[(b * tiles,)](
            grad, x, scale, along, dx, n, c, *steps(grad, planar), *steps(x, planar),
            *steps(dx, planar), ACC=_acc(x.dtype), **tile.blocks, **tile.options(),
        )  # fmt: skip
    # In float64, since as many rounding errors would meet here as there are images.
    totals = (t.sum(0, dtype=torch.float64) for t in (dweight, dbias))
    return dx, *(t.to(v.dtype) for t, v in zip(totals, (weight, bias), strict=True))


# ---- ahead of time -------------------------------------------------------------------------------

_IN_DTYPE = {"grad", "x", "y", "dx", "weight", "bias"}
_CHANNELS = {"tile": (384,), "image": (384, 1536)}
"""Hidden units of ConvNeXt V2 Tiny: its narrowest stage, its third."""


def variants(arch: Arch) -> list[Variant]:
    """Every kernel x layout or width x dtype."""
    found = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for planar in (False, True):
            for which, kernel, absent in (
                ("forward-sums", sums_kernel, ("grad_ptr", "plain_ptr")),
                ("backward-sums", sums_kernel, ()),
                ("forward", forward_kernel, ()),
                ("backward", backward_kernel, ()),
            ):
                contiguous = "inner" if planar else "step"
                constants: dict[str, Any] = {
                    name: 1 for name in kernel.arg_names if name.endswith(f"_{contiguous}")
                }
                if absent:
                    constants |= dict.fromkeys(n for n in kernel.arg_names if n in absent)
                    constants |= {n: 0 for n in kernel.arg_names if n.startswith("grad_")
                                  and n not in absent}  # fmt: skip
                found.append(
                    _variant(arch, which, kernel, _CHANNELS["tile"][0], planar, dtype, constants)
                )
        for c in _CHANNELS["image"]:
            for which, kernel in (("scale", scale_kernel), ("factors", factors_kernel)):
                found.append(_variant(arch, which, kernel, c, False, dtype, {}))
    return found


def _variant(arch, which, kernel, c, planar, dtype, constants) -> Variant:
    name = which.split("-")[-1]
    launch = launch_of(f"grn.{name}", arch, _key(name, c, planar, dtype), _HEURISTICS[name])
    constants = {**constants, "ACC": tl.float32, **launch.blocks}
    signature = {}
    for argument in kernel.arg_names:
        tensor = argument.removesuffix("_ptr")
        if argument.endswith("_ptr"):
            signature[argument] = f"*{NAMES[dtype] if tensor in _IN_DTYPE else 'fp32'}"
        elif argument not in constants:
            signature[argument] = "fp32" if argument == "eps" else "i32"
    shape = f"c{c}" if name in ("scale", "factors") else "planar" if planar else "rows"
    return Variant(f"{which}-{shape}-{NAMES[dtype]}", kernel, signature, constants, launch)
