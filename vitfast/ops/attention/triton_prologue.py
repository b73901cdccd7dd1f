"""Norm and rotation of q and k in one Triton pass each, before the attention kernels.

A pass of its own, not the attention kernel's first lines: there every tile of queries would
normalise all keys again, about a third of the exponentials' cost at 128 queries a tile, where this
moves 4 units (read and write q and k) once. The backward makes the norm's statistics again from the
row, which is short, and sums the weights' gradients to one row a program, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl

from vitfast.ops.attention.reference import Call
from vitfast.ops.attention.triton_kernels_prologue import backward_kernel, forward_kernel
from vitfast.runtime import kernel_calls
from vitfast.runtime.kernel_calls import cdiv, next_power_of_2
from vitfast.runtime.launches import Arch, Launch, Variant, arch_of, launch_of
from vitfast.runtime.triton import NAMES, guard

_NORMS = {"": 0, "layer": 1, "rms": 2}
_PROGRAMS = 512
"""Most programs of a backward, each of which leaves one row of sums of the weights' gradients:
several a multiprocessor of the largest GPUs. Chosen, not measured yet."""


def launch_heuristic(arch: Arch, key: dict[str, Any]) -> Launch:
    """About 2K elements a program, 16 a thread. Chosen, not measured yet."""
    return Launch({"ROWS": max(4, 2048 // next_power_of_2(key["head_dim"]))}, 4, 1)


def _key(which: str, dtype: torch.dtype, d: int) -> dict[str, Any]:
    return {"pass": which, "dtype": str(dtype).removeprefix("torch."), "head_dim": d}


def _constants(dtype: torch.dtype, d: int, norm: str, half: bool) -> dict[str, Any]:
    return {
        "D": d, "BLOCK_D": next_power_of_2(d), "NORM": _NORMS[norm], "HALF": half,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
    }  # fmt: skip


def _rope_steps(call: Call, shape: tuple[int, ...]) -> tuple[int, ...]:
    if call.rope is None:
        return 0, 0, 0, 0
    b, n, h, d = shape
    return call.rope.expand(b, h, n - call.rope_prefix, 2 * d).stride()


def _contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()


def forward(call: Call) -> Call:
    """The call with q and k normalised and rotated; the same call where there is nothing to do."""
    q, k, v = call.split()
    if not call.qk_norm and call.rope is None:
        return call._replace(q=q, k=k, v=v)
    q = _forward(call, q, call.q_norm_weight, call.q_norm_bias)
    k = _forward(call, k, call.k_norm_weight, call.k_norm_bias)
    return call._replace(q=q, k=k, v=v, qk_norm="", rope=None)


def _forward(
    call: Call, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [B, N, H, D], which is q or k, normalised by its weight and bias and rotated."""
    b, n, h, d = x.shape
    # As in the reference, the rotation leaves v's dtype; all are one dtype here.
    out = torch.empty((b, n, h, d), dtype=x.dtype, device=x.device)
    rows = b * n * h
    config = launch_of(
        "attention.prologue", arch_of(x.device), _key("forward", x.dtype, d), launch_heuristic
    )
    args = (
        x, _contiguous(weight), _contiguous(bias), call.rope, out, rows, n, h, call.rope_prefix,
        *x.stride(), *_rope_steps(call, x.shape), call.qk_norm_eps,
    )  # fmt: skip
    constants = _constants(x.dtype, d, call.qk_norm, call.rope_half)
    with guard(x):
        kernel_calls.launch(
            forward_kernel, cdiv(rows, config.blocks["ROWS"]), args, constants, config
        )
    return out


def backward(
    call: Call, dq: torch.Tensor, dk: torch.Tensor, into: tuple[torch.Tensor, torch.Tensor],
    wanted: set[str],
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Writes the gradients of q and k into `into`; gives those of the norms' weights.

    Args:
        dq: [B, N, H, D] contiguous, the gradient of what `forward` made of q; dk likewise.
        wanted: names of arguments.
    """
    q, k, _ = call.split()
    found = {}
    for name, x, grad, out in (("q", q, dq, into[0]), ("k", k, dk, into[1])):
        affine = [f"{name}_norm_weight", f"{name}_norm_bias"]
        given = [getattr(call, n) for n in affine]
        sums_wanted = [n in wanted and t is not None for n, t in zip(affine, given, strict=True)]
        sums = _backward(call, x, given[0], grad, out, sums_wanted)
        for parameter, total, t in zip(affine, sums, given, strict=True):
            if total is not None:
                # In float64, since as many rounding errors would meet here.
                found[parameter] = total.sum(0, dtype=torch.float64).to(t.dtype)
    return found


def _backward(
    call: Call,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    grad: torch.Tensor,
    out: torch.Tensor,
    wanted: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Writes x's gradient to out; sums [programs, D] for the norm's weight and bias, or None.

    Args:
        x: q or k, [B, N, H, D], before norm and rotation; grad is the gradient of what came out.
        wanted: whether the gradient of the weight is wanted, and that of the bias.
    """
    b, n, h, d = x.shape
    rows = b * n * h
    config = launch_of(
        "attention.prologue", arch_of(x.device), _key("backward", x.dtype, d), launch_heuristic
    )
    programs = min(cdiv(rows, config.blocks["ROWS"]), _PROGRAMS)
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = [x.new_empty((programs, d), dtype=wide) if w else None for w in wanted]
    args = (
        grad, x, _contiguous(weight), call.rope, out, *sums, rows, n, h, call.rope_prefix,
        *x.stride(), *_rope_steps(call, x.shape), *out.stride()[:3], call.qk_norm_eps,
    )  # fmt: skip
    constants = _constants(x.dtype, d, call.qk_norm, call.rope_half)
    with guard(x):
        kernel_calls.launch(backward_kernel, programs, args, constants, config)
    return sums


def variants(arch: Arch) -> list[Variant]:
    """As in real models: LayerNorm alone (ViT-22B's), EVA-02's pairs, DINOv3's halves."""
    found = []
    for which, kernel in (("forward", forward_kernel), ("backward", backward_kernel)):
        for kind in (("norm", "layer", False), ("pairs", "", False), ("halves", "", True)):
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                found.append(_variant(arch, which, kernel, kind, dtype))
    return found


def _variant(
    arch: Arch, which: str, kernel: Any, kind: tuple[str, str, bool], dtype: torch.dtype
) -> Variant:
    """kind: a name, the norm and whether halves are turned."""
    name, norm, half = kind
    key = _key(which, dtype, 64)
    launch = launch_of("attention.prologue", arch, key, launch_heuristic)
    constants = {**_constants(dtype, 64, norm, half), **launch.blocks, "x_d": 1, "rope_d": 1}
    absent = {"rope_ptr"} if norm else {"weight_ptr", "bias_ptr", "dweight_ptr", "dbias_ptr"}
    constants |= {n: None for n in kernel.arg_names if n in absent}
    signature = {}
    for arg in kernel.arg_names:
        if arg.endswith("_ptr"):
            wide = arg in ("rope_ptr", "dweight_ptr", "dbias_ptr")
            signature[arg] = "*fp32" if wide else f"*{NAMES[dtype]}"
        else:
            signature[arg] = "fp32" if arg == "eps" else "i32"
    return Variant(f"prologue-{which}-{name}-{NAMES[dtype]}", kernel, signature, constants, launch)
