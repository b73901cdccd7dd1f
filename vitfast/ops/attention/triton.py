"""Attention on the Triton kernels of triton_kernels*.py: launches, and what is compiled for whom.

The statistics [2, B, H, Nq] are each row's shift and the sum of its weights relative to that; the
shift is in units of log2 where nothing is added to the scores. Norm and rotation of q and k are a
pass before the kernels (triton_prologue.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton.language as tl

from vitfast.ops.attention import triton_kernels_backward as kernels
from vitfast.ops.attention import triton_prologue as prologue
from vitfast.ops.attention.reference import INPUTS, Call, wants_gradient
from vitfast.ops.attention.triton_kernels import forward_kernel
from vitfast.runtime import kernel_calls
from vitfast.runtime.kernel_calls import cdiv, next_power_of_2
from vitfast.runtime.launches import Arch, Launch, Variant, arch_of, launch_of
from vitfast.runtime.triton import NAMES, guard, precision

HEAD_DIMS = (16, 32, 64, 72, 80, 88, 96, 104, 112, 128, 256)


def split_dim(d: int) -> tuple[int, int]:
    """D1 and D2: powers of two of at least 16 (or D2 = 0) that hold d columns with least waste."""
    whole = max(16, next_power_of_2(d))
    first = whole // 2
    second = max(16, next_power_of_2(max(d - first, 1)))
    return (whole, 0) if first < 16 or first + second >= whole else (first, second)


_SWITCHES = {"LAZY": 0, "POLYNOMIAL": 0}
"""Of the forward kernel: off until a device's table has measured them to be faster there."""


def launch_heuristic(arch: Arch, key: dict[str, Any]) -> Launch:
    """About the largest tiles that fit registers and shared memory; see `_tiles`."""
    launch = _tiles(arch, key)
    if key["pass"] == "forward":
        return replace(launch, blocks={**launch.blocks, **_SWITCHES})
    return launch


def _tiles(arch: Arch, key: dict[str, Any]) -> Launch:
    """BLOCK_M queries by BLOCK_N keys, by architecture, pass and the head dim's padded width.

    Each rung was cut until the compiled kernel spilled nothing on sm_80 and newer, gfx942 and
    gfx950, and fitted the shared memory of one block; the record is tests/gpu/resources.json, which
    `python -m vitfast.testing.aot --check` makes again. Speed decided none of them, since none has
    been timed yet: `vitfast tune` does that on a device.
    """
    d, wide = sum(split_dim(key["head_dim"])), key["dtype"] in ("float32", "float64")
    if arch.name == "interpreter":
        return Launch({"BLOCK_M": 32, "BLOCK_N": 32}, 4, 1)
    # Hopper and datacentre Blackwell keep operands out of registers.
    is_cdna, is_rdna = arch.warp_size == 64, arch.is_amd and arch.warp_size == 32
    roomy = is_cdna or arch.capability // 10 in (9, 10)
    if not arch.has_dot:  # scalar products, whose operands all lie in shared memory
        m, n = (32, 32) if d <= (96 if wide else 128) else (16, 8 if wide else 16)
    elif is_cdna and d == 256 and key["pass"] == "keys":
        m, n = 16, 32
    elif wide and is_cdna:
        m, n = (32, 32) if d <= 96 and key["pass"] == "forward" else (16, 16)
    elif wide:
        plain = key["pass"] == "forward" and (d > 16 or not key["added"])
        m, n = (32, 16) if d <= 128 and plain else (16, 16)
    elif key["pass"] == "forward":
        widest = 64 if is_rdna else 80 if arch.capability // 10 == 10 else 96
        if key["added"]:
            m, n = (64, 64) if d <= 64 else (64, 32)
        else:
            m, n = (128, 64) if d <= widest else (64, 64) if d <= 128 else (64, 32)
    elif key["pass"] == "keys" and key["added"] and not roomy:
        m, n = 32, 32
    elif d <= 64 and roomy:
        m, n = 64, 64
    elif key["pass"] == "keys" and (
        96 < d <= 128 and is_cdna and key["added"] or d == 96 and arch.capability // 10 == 12
    ):
        m, n = 16, 64
    elif d <= 128 and not is_rdna:
        m, n = (32, 64) if key["pass"] == "keys" else (64, 32)
    else:
        m, n = 32, 32
    # On RDNA 8 warps spill half as much as 4: at most 2924 instead of 4692 bytes on gfx1100. On
    # Hopper 4 warps are as many rows as a matrix instruction takes, and 4 more do the same again;
    # but with a mask or bias the keys' gradient then spills, and so does a head dim of 16.
    square = m == n == 64 and not wide and not (key["added"] and (key["pass"] == "keys" or d == 16))
    # In float32 NVIDIA's 8 warps spill 8 bytes in the gradients' small tiles, and with a mask or
    # bias at narrow head dims; elsewhere 4 do.
    small = wide and not arch.is_amd
    small &= bool(key["added"]) and d <= 64 if key["pass"] == "forward" else m * n <= 256
    warps = 4 if is_cdna or small or (arch.capability // 10 == 9 and square) else 8
    # A second stage doubles the operands' shared memory: too much for 64 KiB, or in float32. For
    # keys of a padded width of 96 it takes 32 bytes more registers a thread than there are.
    stages = 1 if arch.is_amd or wide or arch.shared_bytes < 80_000 else 2
    if key["pass"] == "keys" and d == 96 and not roomy:
        stages = 1
    return Launch({"BLOCK_M": m, "BLOCK_N": n}, warps, stages)


def _key(which: str, dtype: torch.dtype, head_dim: int, tokens: int, added: bool) -> dict[str, Any]:
    return {
        "pass": which,
        "dtype": str(dtype).removeprefix("torch."),
        "head_dim": head_dim,
        "tokens": tokens,
        "added": "mask or bias" if added else "",
    }


def _launch(which: str, call: Call) -> Launch:
    q = call.q
    added = call.mask is not None or call.bias is not None
    key = _key(which, q.dtype, q.shape[-1], q.shape[1], added)
    return launch_of(f"attention.{which}", arch_of(q.device), key, launch_heuristic)


def _in_eighths(*tensors: torch.Tensor) -> bool:
    """Whether all strides of [B, N, H, D] but the last are multiples of 8, and some not of 16."""
    strides = [s for t in tensors for s in t.stride()[:3]]
    return all(s % 8 == 0 for s in strides) and any(s % 16 for s in strides)


def _constants(
    arch: Arch, dtype: torch.dtype, d: int, keep: bool, causal: bool, eighths: bool
) -> dict[str, Any]:
    d1, d2 = split_dim(d)
    return {
        "D": d,
        "D1": d1,
        "D2": d2,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "KEEP": keep,
        "CAUSAL": causal,
        "EIGHTHS": eighths,
        "PRECISION": precision(dtype, arch),
    }


def _addends(call: Call, size: tuple[int, ...]) -> tuple[Any, Any, tuple[int, ...], bool]:
    """Mask, bias, their strides over [B, H, Nq, Nk] and [H, Nq, Nk], and whether mask is bool."""
    mask, bias, keep = call.mask, call.bias, False
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        keep = mask.dtype == torch.bool
        mask = mask.view(torch.uint8) if keep else mask
        strides = mask.expand(size).stride()
    if bias is None:
        return mask, None, (*strides, 0, 0, 0), keep
    return mask, bias, (*strides, *bias.expand(size)[0].stride()), keep


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    call = prologue.forward(call)
    q, k, v = call.split()
    scale = call.factor
    if scale < 0:  # which the kernel does not take, see there
        q, scale = -q, -scale
    batch, queries, heads, d = q.shape
    keys = k.shape[1]
    out = q.new_empty(q.shape)
    wide = torch.promote_types(q.dtype, torch.float32)
    stats = q.new_empty((2, batch, heads, queries) if call.save_stats else (0,), dtype=wide)
    mask, bias, strides, keep = _addends(call, (batch, heads, queries, keys))
    config = _launch("forward", call)
    args = (
        q, k, v, mask, bias, out, stats if call.save_stats else None, batch, heads, queries,
        keys, scale, *q.stride(), *k.stride(), *v.stride(), *strides,
    )  # fmt: skip
    constants = _constants(
        arch_of(q.device), q.dtype, d, keep, call.is_causal, _in_eighths(q, k, v)
    )
    programs = cdiv(queries, config.blocks["BLOCK_M"]) * batch * heads
    with guard(q):
        kernel_calls.launch(forward_kernel, programs, args, constants, config)
    return out, stats


def backward(
    grad: torch.Tensor, call: Call, out: torch.Tensor, stats: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    if stats.device.type == "cpu" and stats[1, 0, 0, 0] < 0:
        out, stats = forward(call)  # the forward ran on another backend, which saves none
    grads = {n: call.q.new_empty(0) for n in INPUTS}
    if call.k is None:
        grads["q"] = call.q.new_empty(call.q.shape)
        dq, dk, dv = grads["q"].unbind(2)
    else:
        dq, dk, dv = (t.new_empty(t.shape) for t in call.split())
        grads |= {"q": dq, "k": dk, "v": dv}
    plain = prologue.forward(call)
    if call.qk_norm or call.rope is not None:
        q, k, _ = plain.split()
        turned = q.new_empty(q.shape), k.new_empty(k.shape)
        dbias = _launch_backward(grad, plain, out, stats, (*turned, dv))
        wanted = {n for n in INPUTS if wants_gradient(call, n)}
        grads |= prologue.backward(call, *turned, (dq, dk), wanted)
    else:
        dbias = _launch_backward(grad, plain, out, stats, (dq, dk, dv))
    if dbias is not None and call.bias is not None:
        grads["bias"] = dbias.view(call.bias.shape).to(call.bias.dtype)
    return tuple(grads.values())


_ROWS = Launch({"BLOCK_M": 16}, 4, 2)
"""1K elements a tensor and program at a head dim of 64. Chosen, not measured yet."""


def _row_state(out: torch.Tensor, grad: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    """[2, B, H, N], see `rows_kernel`, of contiguous out [B, N, H, D] and grad of any strides."""
    batch, n, heads, d = out.shape
    rows = torch.empty_like(stats)
    programs = cdiv(n, _ROWS.blocks["BLOCK_M"]) * batch * heads
    args = (out, grad, stats, rows, batch, heads, n, *grad.stride())
    constants = {
        "D": d, "BLOCK_D": next_power_of_2(d),
        "ACC": tl.float64 if stats.dtype == torch.float64 else tl.float32,
    }  # fmt: skip
    with guard(out):
        kernel_calls.launch(kernels.rows_kernel, programs, args, constants, _ROWS)
    return rows


def _launch_backward(
    grad: torch.Tensor,
    call: Call,
    out: torch.Tensor,
    stats: torch.Tensor,
    into: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> torch.Tensor | None:
    """Writes the gradients of q, k and v `into` these; gives the bias's [H, Nq, Nk], or None.

    Args:
        call: after `prologue.forward`: without norm and rotation.
    """
    dq, dk, dv = into
    q, k, v = call.split()
    batch, queries, heads, d = q.shape
    keys = k.shape[1]
    mask, bias, strides, keep = _addends(call, (batch, heads, queries, keys))
    eighths = _in_eighths(q, k, v, grad, dq, dk, dv)
    constants = _constants(arch_of(q.device), q.dtype, d, keep, call.is_causal, eighths)
    rows = _row_state(out, grad, stats)
    sizes = (batch, heads, queries, keys, call.scale)
    inputs = (q, k, v, mask, bias, grad, stats, rows)
    steps = (*q.stride(), *k.stride(), *v.stride(), *grad.stride())
    with guard(q):
        config = _launch("keys", call)
        kernel_calls.launch(
            kernels.keys_kernel, cdiv(keys, config.blocks["BLOCK_N"]) * batch * heads,
            (*inputs, dk, dv, *sizes, *steps, *dk.stride()[:3], *dv.stride()[:3], *strides),
            constants, config,
        )  # fmt: skip
        config = _launch("queries", call)
        kernel_calls.launch(
            kernels.queries_kernel, cdiv(queries, config.blocks["BLOCK_M"]) * batch * heads,
            (*inputs, dq, *sizes, *steps, *dq.stride()[:3], *strides), constants, config,
        )  # fmt: skip
        if not wants_gradient(call, "bias"):
            return None
        config = _launch("bias", call)
        m, n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
        dbias = q.new_empty((heads, queries, keys), dtype=stats.dtype)
        kernel_calls.launch(
            kernels.bias_kernel, cdiv(queries, m) * cdiv(keys, n) * heads,
            (*inputs, dbias, *sizes, *steps, *strides), constants, config,
        )  # fmt: skip
    return dbias


def variants(arch: Arch) -> list[Variant]:
    """Every pass x head dim x dtype; with a bias for the passes that serve BEiT; each switch."""
    found = prologue.variants(arch)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for which in ("forward", "keys", "queries", "bias"):
            for d in HEAD_DIMS:
                for form in _forms(which, d):
                    found.append(_variant(arch, which, d, dtype, form))
        found += [_rows_variant(d, dtype) for d in (32, 64, 72, 128, 256)]
    for switch in _SWITCHES:
        for dtype in (torch.float16, torch.bfloat16):
            plain = _variant(arch, "forward", 64, dtype)
            blocks = {**plain.launch.blocks, switch: 1}
            found.append(
                replace(
                    plain,
                    name=f"{plain.name}-{switch.lower()}",
                    constants={**plain.constants, **blocks},
                    launch=replace(plain.launch, blocks=blocks),
                )
            )
    return found


def _forms(which: str, d: int) -> tuple[str, ...]:
    """What is compiled of a pass: the usual call, and at some head dims what masked calls need."""
    if which == "bias":
        return ("bias",)
    return ("", "bias", "mask", "float-mask", "causal") if d in (16, 64, 128) else ("",)


def _variant(arch: Arch, which: str, d: int, dtype: torch.dtype, form: str = "") -> Variant:
    kernel = forward_kernel if which == "forward" else getattr(kernels, f"{which}_kernel")
    key = _key(which, dtype, d, 1024, form in ("bias", "mask", "float-mask"))
    launch = launch_of(f"attention.{which}", arch, key, launch_heuristic)
    eighths = d % 16 == 8  # of a packed qkv only heads are no multiples of 16 apart
    constants = _constants(arch, dtype, d, form == "mask", form == "causal", eighths)
    constants |= launch.blocks
    # Contiguous head dims, as of a packed qkv.
    inner = ("q_d", "k_d", "v_d", "grad_d", "bias_k", "mask_k")
    constants |= {n: 1 for n in kernel.arg_names if n in inner}
    if "mask" not in form:
        constants["mask_ptr"] = None
    if form != "bias":
        constants["bias_ptr"] = None
    name = f"{which}-d{d}-{NAMES[dtype]}{f'-{form}' if form and which != 'bias' else ''}"
    signature = _signature(kernel, dtype)
    if form == "mask":
        signature["mask_ptr"] = "*u8"
    uneven = frozenset(n for n in kernel.arg_names if eighths and n.endswith("_h"))
    return Variant(
        name, kernel, signature, constants, launch, dots=dtype != torch.float32, uneven=uneven
    )


def _rows_variant(d: int, dtype: torch.dtype) -> Variant:
    constants = {
        "D": d, "BLOCK_D": next_power_of_2(d), "ACC": tl.float32, "grad_d": 1, **_ROWS.blocks
    }  # fmt: skip
    kernel = kernels.rows_kernel
    return Variant(f"rows-d{d}-{NAMES[dtype]}", kernel, _signature(kernel, dtype), constants, _ROWS)


def _signature(kernel: Any, dtype: torch.dtype) -> dict[str, str]:
    wide = ("stats_ptr", "rows_ptr", "dbias_ptr")
    return {
        name: ("*fp32" if name in wide else f"*{NAMES[dtype]}")
        if name.endswith("_ptr")
        else "fp32"
        if name == "scale"
        else "i32"
        for name in kernel.arg_names
    }
