"""grn on the kernels of triton_kernels.py: launches, and what is compiled for whom."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common.triton_tiles import sums_heuristic, tile_heuristic
from vitfast.ops.grn import triton_kernels as kernels
from vitfast.ops.grn.layout import empty, of_layout, planar_or_dense, sizes, steps
from vitfast.ops.grn.reference import Call
from vitfast.runtime import kernel_calls
from vitfast.runtime.kernel_calls import cdiv, next_power_of_2
from vitfast.runtime.launches import Arch, Launch, Variant, arch_of, launch_of
from vitfast.runtime.triton import NAMES, guard

_PARTS = 256
"""Most parts of an image, each with a sum of its own: with 3 blocks of 128 channels, those of the
narrowest stage of ConvNeXt V2 Tiny, programs for several waves of the largest GPUs (132 to 192
multiprocessors) from one image, and few enough rows for one program to add up. Chosen, not measured
yet."""


# ---- launches ------------------------------------------------------------------------------------


def image_heuristic(arch: Arch, key: dict[str, Any]) -> Launch:
    """All channels of an image in one program, 1024 at a time: 128 or more a warp.

    PARTS partial sums are loaded at a time. Both chosen, not measured yet: no kernel spills.
    """
    block = min(next_power_of_2(key["c"]), 1024)
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


def _sums(
    grad: torch.Tensor | None, x: torch.Tensor, planar: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Partial sums [B, parts, C]: of x^2, or with a gradient of grad * x and of grad."""
    b, n, c = sizes(x)
    config = _launch("sums", x, planar)
    rows = config.blocks["ROWS"]
    # From four tiles on a part's sum is worth its place in memory; chosen, not measured yet.
    per = max(4 * rows, cdiv(cdiv(n, _PARTS), rows) * rows)
    parts = cdiv(n, per)
    products = x.new_empty((b, parts, c), dtype=_wide(x.dtype))
    plain = None if grad is None else torch.empty_like(products)
    programs = b * parts * cdiv(c, config.blocks["BLOCK"])
    args = (
        grad, x, products, plain, n, c, per, *((0, 0, 0) if grad is None else steps(grad, planar)),
        *steps(x, planar),
    )  # fmt: skip
    kernel_calls.launch(kernels.sums_kernel, programs, args, _constants(x), config)
    return products, plain


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _constants(x: torch.Tensor) -> dict[str, Any]:
    """What every kernel here gets."""
    return {"ACC": tl.float64 if x.dtype == torch.float64 else tl.float32}


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The result and the channels' norms [B, C], float32 or float64."""
    x = call.x
    b, n, c = sizes(x)
    y = empty(x, call.result_dtype)
    norms = x.new_empty((b, c), dtype=_wide(x.dtype))
    if x.numel() == 0:
        return y, norms.zero_()
    planar, x = planar_or_dense(x)
    weight, bias = norm_op.vector(call.weight), norm_op.vector(call.bias)
    scale = torch.empty_like(norms)
    image, tile = _launch("scale", x, planar), _launch("forward", x, planar)
    tiles = cdiv(n, tile.blocks["ROWS"]) * cdiv(c, tile.blocks["BLOCK"])
    with guard(x):
        squares, _ = _sums(None, x, planar)
        kernel_calls.launch(
            kernels.scale_kernel, b,
            (squares, weight, norms, scale, squares.shape[1], c, call.eps), _constants(x), image,
        )  # fmt: skip
        kernel_calls.launch(
            kernels.forward_kernel, b * tiles,
            (x, scale, bias, y, n, c, *steps(x, planar), *steps(y, planar)), _constants(x), tile,
        )  # fmt: skip
    return y, norms


def backward(grad: torch.Tensor, call: Call, norms: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of x, weight and bias from the result's and the norms that `forward` gave."""
    x, weight, bias = call.x, norm_op.vector(call.weight), call.bias
    b, n, c = sizes(x)
    dx = empty(x, x.dtype)
    if x.numel() == 0:
        return dx, weight.new_zeros(c), bias.new_zeros(c)
    planar, x = planar_or_dense(x)
    grad = of_layout(grad, planar)
    scale, along, dweight, dbias = (torch.empty_like(norms) for _ in range(4))
    image, tile = _launch("factors", x, planar), _launch("backward", x, planar)
    tiles = cdiv(n, tile.blocks["ROWS"]) * cdiv(c, tile.blocks["BLOCK"])
    with guard(x):
        products, plain = _sums(grad, x, planar)
        kernel_calls.launch(
            kernels.factors_kernel, b,
            (products, plain, weight, norms, scale, along, dweight, dbias, products.shape[1], c,
             call.eps),
            _constants(x), image,
        )  # fmt: skip
        kernel_calls.launch(
            kernels.backward_kernel, b * tiles,
            (grad, x, scale, along, dx, n, c, *steps(grad, planar), *steps(x, planar),
             *steps(dx, planar)),
            _constants(x), tile,
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
    found: list[Variant] = []
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


def _variant(
    arch: Arch, which: str, kernel: Any, c: int, planar: bool, dtype: torch.dtype,
    constants: dict[str, Any],
) -> Variant:  # fmt: skip
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
