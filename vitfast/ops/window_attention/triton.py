"""Windowed attention in Triton, the launches of triton_kernels.py and triton_kernels_large.py.

The statistics [2, B, windows, heads, N] are each row's shift, in units of log2, and the sum of its
weights relative to that. Sums over windows are made by a bounded number of programs, each of the
same windows every time, and added up in one order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vitfast.ops.window_attention import native
from vitfast.ops.window_attention import triton_kernels as kernels
from vitfast.ops.window_attention import triton_kernels_large as large
from vitfast.ops.window_attention.reference import LARGEST_SCALE
from vitfast.runtime.launches import Arch, Launch, Variant, arch_of, launch_of
from vitfast.runtime.triton import NAMES, guard, precision

_PROGRAMS = 2048
"""From so many programs on, each gets several windows."""
_SUMMING = 512
"""Most programs that leave a sum [N, N] each, where there are no more tiles than that."""
_FOLD = Launch({"BLOCK_T": 16, "BLOCK_N": 64}, 4, 1)
_KERNELS = {
    "forward": kernels.forward_kernel,
    "backward": kernels.backward_kernel,
    "queries": large.queries_kernel,
    "keys": large.keys_kernel,
    "bias": large.bias_kernel,
}


def in_one_tile(arch: Arch, key: dict[str, Any]) -> bool:
    """Whether a program of the backward holds all scores of a window, and takes all gradients."""
    if arch.name == "interpreter":
        return key["tokens"] <= 64
    if _wide(key) or key["tokens"] > 64 or key["head_dim"] > 32:
        return False
    if arch.is_amd:
        return arch.warp_size == 64
    # NVIDIA's registers hold only just as much as the plainest windows need.
    return arch.has_dot and not key["form"]


def launch_heuristic(arch: Arch, key: dict[str, Any]) -> Launch:
    """Tiles that fit registers and shared memory; see tests/gpu/resources.json."""
    if key["pass"] == "backward":
        return Launch({}, 8 if arch.capability // 10 in (9, 10) else 4, 1)
    whole = _power(key["tokens"])
    if key["pass"] == "forward" and in_one_tile(arch, key):
        return Launch({"BLOCK_M": whole, "BLOCK_N": whole}, 4, 1)
    if arch.name == "interpreter":
        return Launch({"BLOCK_M": 16, "BLOCK_N": 16}, 4, 1)
    m, n = _tiles(arch, key)
    warps = 8 if key["pass"] == "keys" and m == 32 and _wide(key) else 4
    return Launch({"BLOCK_M": min(m, whole), "BLOCK_N": min(n, whole)}, warps, 1)


def _wide(key: dict[str, Any]) -> bool:
    return key["dtype"] in ("float32", "float64")


def _tiles(arch: Arch, key: dict[str, Any]) -> tuple[int, int]:
    d, n, wide = _power(key["head_dim"]), key["tokens"], _wide(key)
    family = arch.capability // 10
    if wide and d <= 32 and key["pass"] == "keys" and not arch.is_amd:
        slim = family in (9, 12) or (arch.capability == 80 and key["form"])
        return 32, 16 if slim else 32
    if wide and d <= 32 and key["pass"] == "queries" and arch.capability == 80:
        return (32, 32) if n <= 64 else (16, 32)
    if wide and d <= 32 and key["pass"] == "queries" and arch.capability == 100:
        return (16, 32) if n <= 64 else (16, 16)
    if wide or not arch.has_dot or d > 128:
        return (32, 16) if key["pass"] == "forward" and d <= 128 and family != 10 else (16, 16)
    if d > 64:
        return 32, 32
    if key["pass"] == "forward":
        return (64, 32) if arch.capability in (86, 89) else (64, 64)
    if key["pass"] == "bias" and family == 12:
        return 32, 32
    if key["pass"] == "queries" and (
        family == 12 or (key["form"] == "cosine" and arch.name.startswith("gfx11"))
    ):
        return 32, 32
    return (32, 32) if key["pass"] == "keys" else (64, 32)


def _power(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def _key(which: str, dtype: torch.dtype, d: int, tokens: int, extra: str) -> dict[str, Any]:
    """`extra` is what the window has beside a bias: "pad_ptr" or "logit_ptr", or neither."""
    return {
        "pass": which,
        "dtype": str(dtype).removeprefix("torch."),
        "head_dim": d,
        "tokens": tokens,
        "form": {"": "", "pad_ptr": "padded", "logit_ptr": "cosine"}[extra],
    }


def _constants(
    which: str,
    dtype: torch.dtype,
    d: int,
    window: tuple[int, int],
    shifted: bool,
    roll_first: bool,
    grid: bool,
) -> dict[str, Any]:
    found = {
        "WH": window[0], "WW": window[1], "D": d, "BLOCK_D": _power(d),
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32, "SHIFTED": shifted,
        "ROLL_FIRST": roll_first, "GRID": grid, "TURNED": _turns(window[0] * window[1]),
        "PRECISION": precision(dtype),
    }  # fmt: skip
    return found | ({"WHOLE": _power(window[0] * window[1])} if which == "backward" else {})


def _turns(tokens: int) -> bool:
    """Whether to lay the table out by heads: where it is gathered anew for every tile."""
    return tokens > 64


def _packed(t: torch.Tensor | None, dtype: torch.dtype | None = None) -> torch.Tensor | None:
    return None if t is None else t.to(dtype or t.dtype).contiguous()


class _Problem:
    """The arguments that all kernels share, and their launches."""

    def __init__(self, qkv, window, shift, table, pad, logit_scale, scale, roll_first, grid):
        batch, high, wide, _, self.heads, d = qkv.shape
        self.qkv, self.window, self.tokens = qkv, window, window[0] * window[1]
        self.windows = batch * triton.cdiv(high, window[0]) * triton.cdiv(wide, window[1])
        self.shape = (any(shift), roll_first, grid)
        if table is not None and _turns(self.tokens):
            table = table.t().contiguous().t()
        if high % window[0] == wide % window[1] == 0:
            pad = None  # there is no padding
        self.arguments = {
            "qkv_ptr": qkv, "table_ptr": table, "pad_ptr": _packed(pad, qkv.dtype),
            "logit_ptr": _packed(logit_scale), "windows": self.windows,
            "high": high, "wide": wide, "heads": self.heads,
            "scale": d**-0.5 if scale is None else scale, "shift_y": shift[0], "shift_x": shift[1],
            **dict(zip(_STRIDES, qkv.stride(), strict=True)),
            "table_p": 0 if table is None else table.stride(0),
            "table_h": 0 if table is None else table.stride(1),
        }  # fmt: skip

    def key(self, which: str) -> dict[str, Any]:
        given = (n for n in ("pad_ptr", "logit_ptr") if self.arguments[n] is not None)
        return _key(which, self.qkv.dtype, self.qkv.shape[-1], self.tokens, next(given, ""))

    def blocks(self, which: str) -> Launch:
        arch = arch_of(self.qkv.device)
        return launch_of(f"window_attention.{which}", arch, self.key(which), launch_heuristic)

    def parts(self, most: int, tiles: int, windows: int | None = None) -> int:
        """How many programs share out the windows of a head's tile, `windows` at most each."""
        found = max(1, most // (self.heads * tiles))
        if arch_of(self.qkv.device).name == "interpreter":
            found = 2  # few problems would be large enough for a program to get several windows
        if windows is not None:
            found = max(found, triton.cdiv(self.windows, windows))
        return triton.cdiv(self.windows, triton.cdiv(self.windows, found))

    def launch(self, which: str, parts: int, tiles: int, **pointers: torch.Tensor | None) -> None:
        launch = self.blocks(which)
        _KERNELS[which][(parts * tiles * self.heads,)](
            **self.arguments, **pointers, per=triton.cdiv(self.windows, parts),
            **_constants(which, self.qkv.dtype, self.qkv.shape[-1], self.window, *self.shape),
            **launch.blocks, **launch.options(),
        )  # fmt: skip

    def sums(self, wanted: bool, *shape: int) -> torch.Tensor | None:
        wide = torch.promote_types(self.qkv.dtype, torch.float32)
        return self.qkv.new_empty(shape, dtype=wide) if wanted else None


_STRIDES = ("qkv_b", "qkv_y", "qkv_x", "qkv_3", "qkv_h", "qkv_d")


def forward(qkv, window, shift, table, pad, logit_scale, scale, roll_first, grid, save_stats):
    problem = _Problem(qkv, window, shift, table, pad, logit_scale, scale, roll_first, grid)
    batch, high, wide, _, heads, d = qkv.shape
    out = qkv.new_empty(batch, high, wide, heads, d)
    stats = problem.sums(True, *(native.stats_shape(qkv, window) if save_stats else (0,)))
    tiles = triton.cdiv(problem.tokens, problem.blocks("forward").blocks["BLOCK_M"])
    with guard(qkv):
        problem.launch(
            "forward", problem.parts(_PROGRAMS, tiles, windows=8), tiles, out_ptr=out,
            stats_ptr=stats if save_stats else None,
        )  # fmt: skip
    return out, stats


def backward(
    grad, stats, qkv, window, shift, table, pad, logit_scale, scale, roll_first, grid, wanted
):  # fmt: skip
    problem = _Problem(qkv, window, shift, table, pad, logit_scale, scale, roll_first, grid)
    padded = problem.arguments["pad_ptr"] is not None
    wants_pad, wanted = wanted[2], [*wanted[:2], wanted[2] and padded, wanted[3]]
    dqkv = qkv.new_empty(qkv.shape) if wanted[0] else None
    grad = grad.contiguous()
    with guard(qkv):
        if in_one_tile(arch_of(qkv.device), problem.key("backward")):
            dbias, dpad, dscale = _backward(problem, grad, dqkv, wanted)
        else:
            if stats.device.type == "cpu" and stats.flatten()[-1] < 0:
                # The forward ran on another backend, which saves none.
                _, stats = forward(
                    qkv, window, shift, table, pad, logit_scale, scale, roll_first, grid, True
                )
            dbias, dpad, dscale = _large_backward(problem, grad, stats, dqkv, wanted)
        if dbias is not None:
            dbias = _folded(dbias, table, window)
    if wants_pad:
        sums = torch.zeros_like(pad, memory_format=torch.contiguous_format)
        if dpad is not None:  # In float64, since as many rounding errors would meet here.
            sums[1:] = dpad.sum(0, dtype=torch.float64)
        dpad = sums
    if dscale is not None:  # of exp(min(x, largest))
        x = logit_scale.to(dscale.dtype)
        slope = x.clamp(max=LARGEST_SCALE).exp() * (x <= LARGEST_SCALE)
        dscale = (dscale.sum(0, dtype=torch.float64) * slope).to(logit_scale.dtype)
    found = (dqkv, dbias, dpad, dscale)
    return tuple(qkv.new_empty(0) if t is None else t for t in found)


def _backward(problem, grad, dqkv, wanted):
    heads, d, n = problem.heads, problem.qkv.shape[-1], problem.tokens
    parts = problem.parts(_SUMMING if wanted[1] or wanted[3] else _PROGRAMS, 1)
    dbias = problem.sums(wanted[1], parts, heads, n, n)
    dpad = problem.sums(wanted[2], problem.windows, 2, heads, d)
    dscale = problem.sums(wanted[3], parts, heads)
    problem.launch(
        "backward", parts, 1, grad_ptr=grad, dqkv_ptr=dqkv, dbias_ptr=dbias, dpad_ptr=dpad,
        dscale_ptr=dscale,
    )  # fmt: skip
    return dbias, dpad, dscale


def _large_backward(problem, grad, stats, dqkv, wanted):
    heads, d, n = problem.heads, problem.qkv.shape[-1], problem.tokens
    others = wanted[0] or wanted[1] or wanted[2]  # than queries, and they need delta
    delta = problem.sums(others, problem.windows, heads, n)
    given = {"grad_ptr": grad, "stats_ptr": stats, "delta_ptr": delta}
    dbias = dpad = None
    tiles = triton.cdiv(n, problem.blocks("queries").blocks["BLOCK_M"])
    parts = problem.parts(_PROGRAMS, tiles)
    dscale = problem.sums(wanted[3], parts * tiles, heads)
    problem.launch("queries", parts, tiles, **given, dqkv_ptr=dqkv, dscale_ptr=dscale)
    if wanted[0] or wanted[2]:
        tiles = triton.cdiv(n, problem.blocks("keys").blocks["BLOCK_N"])
        parts = problem.parts(_PROGRAMS, tiles)
        dpad = problem.sums(wanted[2], parts * tiles, 2, heads, d)
        problem.launch("keys", parts, tiles, **given, dqkv_ptr=dqkv, dpad_ptr=dpad)
    if wanted[1]:
        blocks = problem.blocks("bias").blocks
        tiles = triton.cdiv(n, blocks["BLOCK_M"]) * triton.cdiv(n, blocks["BLOCK_N"])
        parts = problem.parts(_SUMMING, tiles)
        dbias = problem.sums(True, parts, heads, n, n)
        problem.launch("bias", parts, tiles, **given, dbias_ptr=dbias)
    return dbias, dpad, dscale


def _folded(dbias, table, window):
    """The gradient of the table from those of the scores, [parts, heads, N, N]."""
    heads = dbias.shape[1]
    total = dbias.sum(0) if len(dbias) > 1 else dbias[0]
    dtable = table.new_empty(table.shape)
    grid = (triton.cdiv(len(table), _FOLD.blocks["BLOCK_T"]) * heads,)
    large.fold_kernel[grid](
        total, dtable, heads, WH=window[0], WW=window[1],
        ACC=tl.float64 if total.dtype == torch.float64 else tl.float32, **_FOLD.blocks,
        **_FOLD.options(),
    )  # fmt: skip
    return dtable


_CASES = (
    ("swin7", (7, 7), "", (torch.float16, torch.bfloat16, torch.float32)),
    ("swin7-padded", (7, 7), "pad_ptr", (torch.float16, torch.bfloat16, torch.float32)),
    ("swin12", (12, 12), "", (torch.float16, torch.bfloat16, torch.float32)),
    ("v2-8", (8, 8), "logit_ptr", (torch.float16, torch.bfloat16, torch.float32)),
    ("v2-16", (16, 16), "logit_ptr", (torch.float16, torch.bfloat16, torch.float32)),
    ("v2-24", (24, 24), "logit_ptr", (torch.float16,)),
)
"""Swin's windows, also padded with the bias of qkv, and V2's by cosine; all shifted."""


def variants(arch: Arch) -> list[Variant]:
    found = []
    for name, window, extra, dtypes in _CASES:
        for dtype in dtypes:
            key = _key("backward", dtype, 32, window[0] * window[1], extra)
            passes = ("backward",) if in_one_tile(arch, key) else ("queries", "keys", "bias")
            for which in ("forward", *passes):
                found.append(_variant(arch, which, name, window, extra, dtype))
    return [*found, *(_fold_variant(w) for w in ((7, 7), (16, 16)))]


def _variant(arch, which, name, window, extra, dtype):
    kernel = _KERNELS[which]
    key = _key(which, dtype, 32, window[0] * window[1], extra)
    launch = launch_of(f"window_attention.{which}", arch, key, launch_heuristic)
    constants = _constants(which, dtype, 32, window, shifted=True, roll_first=True, grid=False)
    constants |= {**launch.blocks, "qkv_d": 1}
    gradients = {"pad_ptr": "dpad_ptr", "logit_ptr": "dscale_ptr"}
    absent = {n for pair in gradients.items() if pair[0] != extra for n in pair}
    constants |= {n: None for n in kernel.arg_names if n in absent}
    moving = ("qkv_ptr", "pad_ptr", "grad_ptr", "out_ptr", "dqkv_ptr")
    signature = {
        n: (f"*{NAMES[dtype]}" if n in moving else "*fp32")
        if n.endswith("_ptr")
        else "fp32" if n == "scale" else "i32"
        for n in kernel.arg_names
    }  # fmt: skip
    name = f"{which}-{name}-{NAMES[dtype]}"
    return Variant(name, kernel, signature, constants, launch, dots=dtype != torch.float32)


def _fold_variant(window):
    constants = {"WH": window[0], "WW": window[1], "ACC": tl.float32, **_FOLD.blocks}
    signature = {"dbias_ptr": "*fp32", "dtable_ptr": "*fp32", "heads": "i32"}
    name = f"fold-{window[0]}-fp32"
    return Variant(name, large.fold_kernel, signature, constants, _FOLD)
