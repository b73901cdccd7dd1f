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
from vitfast.ops.grn import triton_kernels as kernels
from vitfast.ops.grn.layout import empty, of_layout, planar_or_dense, sizes, steps
from vitfast.ops.grn.reference import promoted
from vitfast.runtime.launches import Arch, Launch, Variant, arch_of, launch_of
from vitfast.runtime.triton import NAMES, guard

_PARTS = 256
"""Most parts of an image, each with a sum of its own."""


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
    kernels.sums_kernel[grid](
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
        kernels.scale_kernel[(b,)](
            squares, weight, norms, scale, squares.shape[1], c, eps,
            ACC=_acc(x.dtype), **image.blocks, **image.options(),
        )  # fmt: skip
        kernels.forward_kernel[(b * tiles,)](
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
        kernels.factors_kernel[(b,)](
            products, plain, weight_, norms, scale, along, dweight, dbias, products.shape[1], c,
            eps, ACC=_acc(x.dtype), **image.blocks, **image.options(),
        )  # fmt: skip
        kernels.backward_kernel[(b * tiles,)](
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
                ("forward-sums", kernels.sums_kernel, ("grad_ptr", "plain_ptr")),
                ("backward-sums", kernels.sums_kernel, ()),
                ("forward", kernels.forward_kernel, ()),
                ("backward", kernels.backward_kernel, ()),
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
            for which, kernel in (
                ("scale", kernels.scale_kernel),
                ("factors", kernels.factors_kernel),
            ):
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
