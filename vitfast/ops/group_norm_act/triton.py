"""group_norm_act on the kernels of triton_kernels.py.

Groups that a program can hold in registers go through in one launch. Of others each part of an
image gets moments by channel (or, backward, sums), which a second launch puts together by group,
in their order, and a third goes over the map. Parts depend on the image's size alone: the same bits
every time, whatever else is in the batch.

Floors, in maps read or written: forward 2 in one launch, else 3 (x is read again), and the residual
one more; backward 3 (gradient, x, dx), else 5, and ReLU's result one more a read, dresidual one.
About 9 flops an element, 15 backward: memory decides.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common.triton_tiles import sums_heuristic, tile_heuristic
from vitfast.ops.group_norm_act import triton_kernels as kernels
from vitfast.ops.group_norm_act.native import dense, empty
from vitfast.ops.group_norm_act.reference import BackwardCall, Call, channels_last
from vitfast.runtime import kernel_calls
from vitfast.runtime.kernel_calls import cdiv, next_power_of_2
from vitfast.runtime.launches import Arch, Launch, Variant, arch_of, launch_of
from vitfast.runtime.triton import NAMES, guard

_PARTS = 512
"""Most parts of an image: programs for several waves of the largest GPUs (132 to 192
multiprocessors) from one image whose channels are a single block, and few enough to add up. Chosen,
not measured yet."""
_MOST = {"whole": 16384, "whole_backward": 8192}
"""Elements that a program holds; the backward holds x and the gradient. At 32 elements a thread
that is the most that 16 warps hold: 16,384 of 512 threads. Nothing spills with it on the twelve
architectures of tests/gpu/resources.json."""
_SECTOR = 32
"""Bytes beside each other that an NVIDIA GPU reads at once; a group narrower than that shares a
program with its neighbours, or each would read the others' bytes as well."""


# ---- launches ------------------------------------------------------------------------------------


def in_one_program(which: str, key: dict[str, Any]) -> bool:
    """Whether a program holds whole groups, as many as fill a sector of memory."""
    return _together(key) * _elements(key) <= _MOST[which]


def _together(key: dict[str, Any]) -> int:
    """Groups side by side that a sector takes."""
    size = 2 if key["dtype"] in ("float16", "bfloat16") else 4
    if key["planar"]:
        return 1
    fill = max(1, _SECTOR // (size * next_power_of_2(key["width"])))
    return min(next_power_of_2(key["groups"]), fill)


def _elements(key: dict[str, Any]) -> int:
    return next_power_of_2(key["pixels"]) * next_power_of_2(key["width"])


def _warps(arch: Arch, threads: int) -> int:
    return max(1, min(16, threads // 32) // (arch.warp_size // 32))


def whole_heuristic(arch: Arch, key: dict[str, Any]) -> Launch:
    """Groups for at least 1K elements a program; 32 of them a thread.

    1K is one warp at 32 elements a thread. Chosen, not measured yet: nothing spills with it.
    """
    held = _elements(key)
    groups = max(_together(key), min(next_power_of_2(key["groups"]), 1024 // held))
    return Launch({"GROUPS": groups}, _warps(arch, groups * held // 32), 1)


def groups_heuristic(arch: Arch, key: dict[str, Any]) -> Launch:
    """2K sums at a time, 16 a thread of four warps: 64 channels, of wide groups 512, by parts.

    Chosen, not measured yet: nothing spills with it.
    """
    span = min(next_power_of_2(key["width"]), 512)
    groups = max(1, min(next_power_of_2(key["groups"]), 64 // span))
    return Launch(
        {"GROUPS": groups, "SPAN": span, "PARTS": min(32, 2048 // (groups * span))},
        _warps(arch, 128), 1,
    )  # fmt: skip


_HEURISTICS = {
    "whole": whole_heuristic, "whole_backward": whole_heuristic,
    "moments": sums_heuristic, "apply": tile_heuristic,
    "sums": sums_heuristic, "gradient": tile_heuristic,
    "combine": groups_heuristic, "factors": groups_heuristic,
}  # fmt: skip
_KERNELS = {which: getattr(kernels, f"{which}_kernel") for which in _HEURISTICS}


def _keys(
    pixels: int, groups: int, width: int, planar: bool, dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """What each kernel's launch depends on."""
    name = str(dtype).removeprefix("torch.")
    tile = {"c": groups * width, "planar": int(planar), "dtype": name}
    shape = {"pixels": pixels, "groups": groups, "width": width}
    whole = {**shape, "planar": int(planar), "dtype": name}
    by_group = {"groups": groups, "width": width}
    return {
        "whole": {**whole, "pass": "forward"}, "whole_backward": {**whole, "pass": "backward"},
        **dict.fromkeys(("moments", "apply", "sums", "gradient"), tile),
        **dict.fromkeys(("combine", "factors"), by_group),
    }  # fmt: skip


def _launch_of(which: str, arch: Arch, key: dict[str, Any]) -> Launch:
    return launch_of(f"group_norm_act.{which}", arch, key, _HEURISTICS[which])


class _Problem:
    """A map's sizes and layout, and launches on it."""

    def __init__(self, x: torch.Tensor, groups: int) -> None:
        self.b, self.c, h, w = x.shape
        self.n, self.groups, self.width = h * w, groups, self.c // groups
        self.last, self.arch = channels_last(x), arch_of(x.device)
        self.keys = _keys(self.n, groups, self.width, not self.last, x.dtype)
        self.acc = tl.float64 if x.dtype == torch.float64 else tl.float32
        self.constants = {"WIDTH": self.width, "ACC": self.acc}
        # Those of the kernels that hold whole groups.
        span, pixels = next_power_of_2(self.width), next_power_of_2(self.n)
        self.held = {**self.constants, "SPAN": span, "PIXELS": pixels}

    def config(self, which: str) -> Launch:
        return _launch_of(which, self.arch, self.keys[which])

    def whole(self, which: str) -> bool:
        return in_one_program(which, self.keys[which])

    def by_group(self, config: Launch) -> int:
        return self.b * cdiv(self.groups, config.blocks["GROUPS"])

    def by_tile(self, config: Launch) -> int:
        return self.b * cdiv(self.n, config.blocks["ROWS"]) * cdiv(self.c, config.blocks["BLOCK"])

    def per(self, config: Launch) -> int:
        """Tiles of a part: from four on its sums are worth their place in memory (chosen, not
        measured yet)."""
        return max(4, cdiv(cdiv(self.n, _PARTS), config.blocks["ROWS"]))

    def by_part(self, config: Launch, per: int) -> tuple[int, tuple[int, ...], int]:
        """The programs, the shape of what they find, and the pixels of a part."""
        pixels = per * config.blocks["ROWS"]
        parts = cdiv(self.n, pixels)
        blocks = cdiv(self.c, config.blocks["BLOCK"])
        return self.b * parts * blocks, (self.b, parts, self.c), pixels

    def steps(self, t: torch.Tensor | None) -> tuple[int, int, int]:
        """Strides of images, pixels and channels; those of dimensions of size 1 mean nothing."""
        if t is None:
            return 0, 0, 0
        image, channel, line, pixel = t.stride()
        if not self.last:
            return image, 1, channel
        return image, line if t.shape[3] == 1 else pixel, 1


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The result [B, C, H, W] and the groups' statistics [B, groups, 2], or nothing."""
    x, groups, eps, relu = call.x, call.groups, call.eps, call.act == "relu"
    y = empty(x, call.result_dtype)
    stats = x.new_empty((x.shape[0], groups, 2), dtype=_wide(x.dtype))
    saved = stats if call.save_stats else norm_op.absent(x)
    if x.numel() == 0:
        return y, saved.zero_()
    p = _Problem(x, groups)
    x, residual = dense(x, p.last), dense(call.residual, p.last)
    weight, bias = norm_op.vector(call.weight), norm_op.vector(call.bias)
    steps = (*p.steps(x), *p.steps(residual), *p.steps(y))
    with guard(x):
        if p.whole("whole"):
            config = p.config("whole")
            kernel_calls.launch(
                kernels.whole_kernel, p.by_group(config),
                (x, weight, bias, residual, y, stats if call.save_stats else None, p.n, groups,
                 *steps, eps),
                {**p.held, "RELU": relu}, config,
            )  # fmt: skip
            return y, saved
        config = p.config("moments")
        per = p.per(config)
        programs, parts, pixels = p.by_part(config, per)
        moments = [x.new_empty(parts, dtype=stats.dtype) for _ in range(3)]
        kernel_calls.launch(
            kernels.moments_kernel, programs, (x, *moments, p.n, p.c, per, *p.steps(x)),
            {"ACC": p.acc}, config,
        )  # fmt: skip
        config = p.config("combine")
        kernel_calls.launch(
            kernels.combine_kernel, p.by_group(config),
            (*moments, stats, p.n, groups, pixels, eps), p.constants, config,
        )  # fmt: skip
        config = p.config("apply")
        kernel_calls.launch(
            kernels.apply_kernel, p.by_tile(config),
            (x, weight, bias, residual, y, stats, p.n, p.c, *steps),
            {**p.constants, "RELU": relu}, config,
        )  # fmt: skip
    return y, saved


def backward(call: BackwardCall) -> tuple[torch.Tensor, ...]:
    """Gradients of x, residual, weight and bias, empty where absent or not wanted."""
    x, groups, stats = call.x, call.groups, call.stats
    dx = empty(x, x.dtype)
    dresidual = None if call.residual_dtype is None else empty(x, call.residual_dtype)
    found = (dx, norm_op.absent(x) if dresidual is None else dresidual)
    vectors = (call.weight, call.bias)
    if x.numel() == 0:
        return *found, *(norm_op.absent(x) if v is None else v.new_zeros(v.shape) for v in vectors)
    p = _Problem(x, groups)
    x, grad, y = dense(x, p.last), dense(call.grad, p.last), dense(call.y, p.last)
    weight = norm_op.vector(call.weight)
    of_images = [
        None if v is None else x.new_empty((p.b, p.c), dtype=_wide(x.dtype)) for v in vectors
    ]
    steps = (*p.steps(grad), *p.steps(x), *p.steps(y))
    with guard(x):
        if p.whole("whole_backward"):
            config = p.config("whole_backward")
            kernel_calls.launch(
                kernels.whole_backward_kernel, p.by_group(config),
                (grad, x, y, weight, stats, dx, dresidual, *of_images, p.n, groups, *steps,
                 *p.steps(dx)),
                p.held, config,
            )  # fmt: skip
        else:
            config = p.config("sums")
            per = p.per(config)
            programs, parts, pixels = p.by_part(config, per)
            plain, product = (x.new_empty(parts, dtype=stats.dtype) for _ in range(2))
            kernel_calls.launch(
                kernels.sums_kernel, programs,
                (grad, x, y, stats, plain, product, p.n, p.c, per, *steps), p.constants, config,
            )  # fmt: skip
            config = p.config("factors")
            factors = torch.empty_like(stats)
            kernel_calls.launch(
                kernels.factors_kernel, p.by_group(config),
                (plain, product, weight, factors, *of_images, p.n, groups, pixels),
                p.constants, config,
            )  # fmt: skip
            config = p.config("gradient")
            kernel_calls.launch(
                kernels.gradient_kernel, p.by_tile(config),
                (grad, x, y, weight, stats, factors, dx, dresidual, p.n, p.c, *steps,
                 *p.steps(dx)),
                p.constants, config,
            )  # fmt: skip
    # In float64, since as many rounding errors would meet here as there are images.
    return *found, *(
        norm_op.absent(x) if t is None or v is None else t.sum(0, dtype=torch.float64).to(v.dtype)
        for t, v in zip(of_images, vectors, strict=True)
    )


# ---- ahead of time -------------------------------------------------------------------------------

_SUMS = {"stats", "mean", "rest", "square", "plain", "product", "factors", "dweight", "dbias"}
_WHOLE = ((196, 32, 32), (784, 32, 4))
"""Pixels, groups and channels of a group in the middle stages of ResNetV2."""
_SPLIT = (3136, 32, 2)
"""In its first stage."""
_ONE_GROUP = (3136, 1, 640)
"""GroupNorm1."""


def variants(arch: Arch) -> list[Variant]:
    """Every kernel x layout x sizes of real maps x dtype, with a residual and ReLU."""
    found = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for sizes in _WHOLE:
            for planar in (False, True):
                keys = _keys(*sizes, planar, dtype)
                found += [
                    _variant(arch, which, sizes, planar, dtype)
                    for which in ("whole", "whole_backward")
                    if in_one_program(which, keys[which])
                ]
        for planar in (False, True):
            for which in ("moments", "apply", "sums", "gradient"):
                found.append(_variant(arch, which, _SPLIT, planar, dtype))
        for which in ("combine", "factors"):
            # Apart from the weight's, their types are float32 always.
            if which == "factors" or dtype == torch.float32:
                for sizes in (_SPLIT, _ONE_GROUP):
                    found.append(_variant(arch, which, sizes, False, dtype))
    return found


def _variant(
    arch: Arch, which: str, sizes: tuple[int, int, int], planar: bool, dtype: torch.dtype
) -> Variant:
    pixels, groups, width = sizes
    kernel = _KERNELS[which]
    launch = _launch_of(which, arch, _keys(pixels, groups, width, planar, dtype)[which])
    known = {
        "ACC": tl.float32, "RELU": True, "WIDTH": width, "SPAN": next_power_of_2(width),
        "PIXELS": next_power_of_2(pixels), **launch.blocks,
    }  # fmt: skip
    contiguous = "_inner" if planar else "_step"
    constants: dict[str, Any] = {n: v for n, v in known.items() if n in kernel.arg_names}
    constants |= {n: 1 for n in kernel.arg_names if n.endswith(contiguous)}
    signature = {}
    for name in kernel.arg_names:
        tensor = name.removesuffix("_ptr")
        if name.endswith("_ptr"):
            signature[name] = f"*{'fp32' if tensor in _SUMS else NAMES[dtype]}"
        elif name not in constants:
            signature[name] = "fp32" if name == "eps" else "i32"
    layout = "" if which in ("combine", "factors") else "-planar" if planar else "-last"
    shape = f"{pixels}x{groups}x{width}"
    return Variant(f"{which}-{shape}{layout}-{NAMES[dtype]}", kernel, signature, constants, launch)
