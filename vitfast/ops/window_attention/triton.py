"""Windowed attention in Triton, the launches of triton_kernels.py and triton_kernels_large.py.

The statistics [2, B, windows, heads, N] are each row's shift, in units of log2, and the sum of its
weights relative to that. Sums over windows are made by a bounded number of programs, each of the
same windows every time, and added up in one order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl

from vitfast.ops.window_attention import triton_kernels as kernels
from vitfast.ops.window_attention import triton_kernels_large as large
from vitfast.ops.window_attention.reference import LARGEST_SCALE, BackwardCall, Call
from vitfast.runtime import kernel_calls
from vitfast.runtime.kernel_calls import cdiv, next_power_of_2
from vitfast.runtime.launches import Arch, Launch, Variant, arch_of, launch_of
from vitfast.runtime.triton import NAMES, guard, precision

_PROGRAMS = 2048
"""From so many programs on, each gets several windows, and gathers its biases once for all of them:
several waves of the largest GPUs (132 to 192 multiprocessors). Chosen, not measured yet."""
_SUMMING = 512
"""Most programs that leave a sum [N, N] each, where there are no more tiles than that: their sums,
5 MB of windows of 49 tokens, are written and read once more. Chosen, not measured yet."""
_FOLD = Launch({"BLOCK_T": 16, "BLOCK_N": 64}, 4, 1)
"""8 elements a thread. Chosen, not measured yet: it is a small part of a backward."""
_KERNELS = {
    "forward": kernels.forward_kernel,
    "backward": kernels.backward_kernel,
    "queries": large.queries_kernel,
    "keys": large.keys_kernel,
    "bias": large.bias_kernel,
}


def in_one_tile(arch: Arch, key: dict[str, Any]) -> bool:
    """Whether a program of the backward holds all scores of a window, and takes all gradients.

    64 x 64 scores and their gradients in float32 are 64 registers a thread of four warps, and q, k,
    v and the gradient as many again. That takes 254 of NVIDIA's 255 registers for the plainest
    windows; padding, cosines, larger windows or head dims would spill, and so would RDNA.
    """
    if arch.name == "interpreter":
        return key["window"] <= 64
    if _wide(key) or key["window"] > 64 or key["head_dim"] > 32:
        return False
    if arch.is_amd:
        return arch.warp_size == 64
    return arch.has_dot and not key["form"]


def launch_heuristic(arch: Arch, key: dict[str, Any]) -> Launch:
    """The largest tiles that spill nothing on each architecture, by tests/gpu/resources.json.

    The exceptions of `_tiles` are architectures whose compiler needs more registers for the same
    tile; sm_75 and RDNA, which may spill, do so by at most 464 bytes a thread. Which of the tiles
    that fit is the fastest is not measured yet.
    """
    if key["pass"] == "backward":
        return Launch({}, 8 if arch.capability // 10 in (9, 10) else 4, 1)
    whole = _power(key["window"])
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
    """Queries and keys of a tile, before they are cut to the window's."""
    d, n, wide = _power(key["head_dim"]), key["window"], _wide(key)
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
    return max(16, next_power_of_2(n))


def _key(which: str, dtype: torch.dtype, d: int, tokens: int, extra: str) -> dict[str, Any]:
    """`extra` is what the window has beside a bias: "pad_ptr" or "logit_ptr", or neither."""
    return {
        "pass": which,
        "dtype": str(dtype).removeprefix("torch."),
        "head_dim": d,
        "window": tokens,
        "form": {"": "", "pad_ptr": "padded", "logit_ptr": "cosine"}[extra],
    }


def _constants(
    arch: Arch,
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
        "PRECISION": precision(dtype, arch),
    }  # fmt: skip
    return found | ({"WHOLE": _power(window[0] * window[1])} if which == "backward" else {})


def _turns(tokens: int) -> bool:
    """Whether to lay the table out by heads: where it is gathered anew for every tile."""
    return tokens > 64


def _packed(t: torch.Tensor | None, dtype: torch.dtype | None = None) -> torch.Tensor | None:
    return None if t is None else t.to(dtype or t.dtype).contiguous()


class _Problem:
    """The arguments that all kernels share, and their launches."""

    def __init__(self, call: Call) -> None:
        qkv, table, pad, window = call.qkv, call.table, call.pad, call.window
        batch, high, wide, _, self.heads, d = qkv.shape
        self.qkv, self.window, self.tokens = qkv, window, call.wh * call.ww
        self.windows = batch * cdiv(high, call.wh) * cdiv(wide, call.ww)
        self.shape = (any(call.shift), call.roll_first, call.grid)
        if table is not None and _turns(self.tokens):
            table = table.t().contiguous().t()
        if high % call.wh == wide % call.ww == 0:
            pad = None  # there is no padding
        self.pad, logit = _packed(pad, qkv.dtype), _packed(call.logit_scale)
        self.extra = "pad_ptr" if self.pad is not None else "" if logit is None else "logit_ptr"
        self.inputs = (qkv, table, self.pad, logit)
        self.sizes = (
            high, wide, self.heads, d**-0.5 if call.scale is None else call.scale, call.sh,
            call.sw, *qkv.stride(), *((0, 0) if table is None else table.stride()),
        )  # fmt: skip

    def key(self, which: str) -> dict[str, Any]:
        return _key(which, self.qkv.dtype, self.qkv.shape[-1], self.tokens, self.extra)

    def blocks(self, which: str) -> Launch:
        arch = arch_of(self.qkv.device)
        return launch_of(f"window_attention.{which}", arch, self.key(which), launch_heuristic)

    def parts(self, most: int, tiles: int, windows: int | None = None) -> int:
        """How many programs share out the windows of a head's tile, `windows` at most each."""
        found = max(1, most // (self.heads * tiles))
        if arch_of(self.qkv.device).name == "interpreter":
            found = 2  # few problems would be large enough for a program to get several windows
        if windows is not None:
            found = max(found, cdiv(self.windows, windows))
        return cdiv(self.windows, cdiv(self.windows, found))

    def launch(self, which: str, parts: int, tiles: int, *pointers: torch.Tensor | None) -> None:
        """`pointers` are those of the kernel that no other shares, in its order."""
        args = (*self.inputs, *pointers, self.windows, cdiv(self.windows, parts), *self.sizes)
        constants = _constants(
            arch_of(self.qkv.device), which, self.qkv.dtype, self.qkv.shape[-1], self.window,
            *self.shape,
        )  # fmt: skip
        kernel_calls.launch(
            _KERNELS[which], parts * tiles * self.heads, args, constants, self.blocks(which)
        )

    def sums(self, *shape: int) -> torch.Tensor:
        """Uninitialised, float32 or float64, for what kernels add up."""
        wide = torch.promote_types(self.qkv.dtype, torch.float32)
        return self.qkv.new_empty(shape, dtype=wide)


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The result [B, H, W, heads, D] and the statistics of `Call.stats_shape`."""
    problem, qkv = _Problem(call), call.qkv
    batch, high, wide, _, heads, d = qkv.shape
    out = qkv.new_empty(batch, high, wide, heads, d)
    stats = problem.sums(*call.stats_shape)
    tiles = cdiv(problem.tokens, problem.blocks("forward").blocks["BLOCK_M"])
    with guard(qkv):
        problem.launch(
            "forward", problem.parts(_PROGRAMS, tiles, windows=8), tiles, out,
            stats if call.save_stats else None,
        )  # fmt: skip
    return out, stats


class _Sums(NamedTuple):
    """What the kernels of a backward leave to be added up, each None where not wanted."""

    bias: torch.Tensor | None = None
    """[programs, heads, N, N]: gradients of the scores."""
    pad: torch.Tensor | None = None
    """[windows or programs, 2, heads, D]: gradients of the padding's k and v."""
    scale: torch.Tensor | None = None
    """[programs, heads]: gradients of the factors exp(min(logit_scale, largest))."""


class _Wanted(NamedTuple):
    """Which gradients are wanted of the kernels, as `BackwardCall.wanted`."""

    qkv: bool
    table: bool
    pad: bool
    logit_scale: bool


def backward(call: BackwardCall) -> tuple[torch.Tensor, ...]:
    """Gradients of `INPUTS`, empty where not wanted."""
    given, qkv, pad = call.forward, call.qkv, call.pad
    problem = _Problem(given)
    wanted = _Wanted(*call.wanted)
    kernels_wanted = wanted._replace(pad=wanted.pad and problem.pad is not None)
    dqkv = qkv.new_empty(qkv.shape) if wanted.qkv else None
    grad = call.grad.contiguous()
    dtable = dpad = dscale = None
    with guard(qkv):
        if in_one_tile(arch_of(qkv.device), problem.key("backward")):
            found = _backward(problem, grad, dqkv, kernels_wanted)
        else:
            stats = call.stats
            if stats.device.type == "cpu" and stats.flatten()[-1] < 0:
                # The forward ran on another backend, which saves none.
                _, stats = forward(given)
            found = _large_backward(problem, grad, stats, dqkv, kernels_wanted)
        if found.bias is not None and call.table is not None:
            dtable = _folded(found.bias, call.table, given.window)
    if wanted.pad and pad is not None:
        dpad = torch.zeros_like(pad, memory_format=torch.contiguous_format)
        if found.pad is not None:  # In float64, since as many rounding errors would meet here.
            dpad[1:] = found.pad.sum(0, dtype=torch.float64)
    if found.scale is not None and call.logit_scale is not None:  # of exp(min(x, largest))
        x = call.logit_scale.to(found.scale.dtype)
        slope = x.clamp(max=LARGEST_SCALE).exp() * (x <= LARGEST_SCALE)
        dscale = (found.scale.sum(0, dtype=torch.float64) * slope).to(call.logit_scale.dtype)
    results = (dqkv, dtable, dpad, dscale)
    return tuple(qkv.new_empty(0) if t is None else t for t in results)


def _backward(
    problem: _Problem, grad: torch.Tensor, dqkv: torch.Tensor | None, wanted: _Wanted
) -> _Sums:
    """Writes dqkv by the kernel of windows of one tile."""
    heads, d, n = problem.heads, problem.qkv.shape[-1], problem.tokens
    parts = problem.parts(_SUMMING if wanted.table or wanted.logit_scale else _PROGRAMS, 1)
    sums = _Sums(
        problem.sums(parts, heads, n, n) if wanted.table else None,
        problem.sums(problem.windows, 2, heads, d) if wanted.pad else None,
        problem.sums(parts, heads) if wanted.logit_scale else None,
    )
    problem.launch("backward", parts, 1, grad, dqkv, sums.bias, sums.pad, sums.scale)
    return sums


def _large_backward(
    problem: _Problem, grad: torch.Tensor, stats: torch.Tensor, dqkv: torch.Tensor | None,
    wanted: _Wanted,
) -> _Sums:  # fmt: skip
    """Writes dqkv by the passes for windows of several tiles."""
    heads, d, n = problem.heads, problem.qkv.shape[-1], problem.tokens
    others = wanted.qkv or wanted.table or wanted.pad  # than queries, and they need delta
    delta = problem.sums(problem.windows, heads, n) if others else None
    given = (grad, stats, delta)
    dbias = dpad = None
    tiles = cdiv(n, problem.blocks("queries").blocks["BLOCK_M"])
    parts = problem.parts(_PROGRAMS, tiles)
    dscale = problem.sums(parts * tiles, heads) if wanted.logit_scale else None
    problem.launch("queries", parts, tiles, *given, dqkv, dscale)
    if wanted.qkv or wanted.pad:
        tiles = cdiv(n, problem.blocks("keys").blocks["BLOCK_N"])
        parts = problem.parts(_PROGRAMS, tiles)
        dpad = problem.sums(parts * tiles, 2, heads, d) if wanted.pad else None
        problem.launch("keys", parts, tiles, *given, dqkv, dpad)
    if wanted.table:
        blocks = problem.blocks("bias").blocks
        tiles = cdiv(n, blocks["BLOCK_M"]) * cdiv(n, blocks["BLOCK_N"])
        parts = problem.parts(_SUMMING, tiles)
        dbias = problem.sums(parts, heads, n, n)
        problem.launch("bias", parts, tiles, *given, dbias)
    return _Sums(dbias, dpad, dscale)


def _folded(dbias: torch.Tensor, table: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """The gradient of the table from those of the scores, [parts, heads, N, N]."""
    heads = dbias.shape[1]
    total = dbias.sum(0) if len(dbias) > 1 else dbias[0]
    dtable = table.new_empty(table.shape)
    programs = cdiv(len(table), _FOLD.blocks["BLOCK_T"]) * heads
    constants = {
        "WH": window[0], "WW": window[1],
        "ACC": tl.float64 if total.dtype == torch.float64 else tl.float32,
    }  # fmt: skip
    kernel_calls.launch(large.fold_kernel, programs, (total, dtable, heads), constants, _FOLD)
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
    """Every pass x window of timm's models x dtype."""
    found: list[Variant] = []
    for name, window, extra, dtypes in _CASES:
        for dtype in dtypes:
            key = _key("backward", dtype, 32, window[0] * window[1], extra)
            passes = ("backward",) if in_one_tile(arch, key) else ("queries", "keys", "bias")
            for which in ("forward", *passes):
                found.append(_variant(arch, which, name, window, extra, dtype))
    return [*found, *(_fold_variant(w) for w in ((7, 7), (16, 16)))]


def _variant(
    arch: Arch, which: str, name: str, window: tuple[int, int], extra: str, dtype: torch.dtype
) -> Variant:
    kernel = _KERNELS[which]
    key = _key(which, dtype, 32, window[0] * window[1], extra)
    launch = launch_of(f"window_attention.{which}", arch, key, launch_heuristic)
    constants = _constants(
        arch, which, dtype, 32, window, shifted=True, roll_first=True, grid=False
    )
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


def _fold_variant(window: tuple[int, int]) -> Variant:
    constants = {"WH": window[0], "WW": window[1], "ACC": tl.float32, **_FOLD.blocks}
    signature = {"dbias_ptr": "*fp32", "dtable_ptr": "*fp32", "heads": "i32"}
    name = f"fold-{window[0]}-fp32"
    return Variant(name, large.fold_kernel, signature, constants, _FOLD)
