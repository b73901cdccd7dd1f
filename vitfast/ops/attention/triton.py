"""Attention on the Triton kernels of triton_kernels.py: launches, and what is compiled for whom.

The statistics [2, B, H, Nq] are each row's shift and the sum of its weights relative to that; the
shift is in units of log2 where nothing is added to the scores. Norm and rotation of q and k are
torch ops before the kernels, differentiated by autograd.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl

from vitfast.ops.attention import triton_kernels as kernels
from vitfast.ops.attention.reference import Call, prologue
from vitfast.ops.attention.vendor import INPUTS, wants_gradient
from vitfast.ops.autodiff import gradients
from vitfast.runtime.gpu import NAMES, precision
from vitfast.runtime.tuning import Arch, Launch, Variant, arch_of, launch_of

HEAD_DIMS = (32, 64, 72, 80, 88, 96, 104, 112, 128, 256)


def split_dim(d: int) -> tuple[int, int]:
    """D1 and D2: powers of two of at least 16 (or D2 = 0) that hold d columns with least waste."""
    whole = max(16, triton.next_power_of_2(d))
    first = whole // 2
    second = max(16, triton.next_power_of_2(max(d - first, 1)))
    return (whole, 0) if first < 16 or first + second >= whole else (first, second)


def launch_heuristic(arch: Arch, key: dict[str, Any]) -> Launch:
    """Tiles that fit registers and shared memory; see tests/gpu/resources.json."""
    d, wide = sum(split_dim(key["head_dim"])), key["dtype"] in ("float32", "float64")
    if arch.name == "interpreter":
        return Launch({"BLOCK_M": 32, "BLOCK_N": 32}, 4, 1)
    if key["pass"] == "forward":
        if wide:
            m, n = (32, 32) if d <= 96 else (16, 16)
        else:
            m, n = (128, 64) if d <= 96 else (64, 64) if d <= 128 else (64, 32)
    elif wide:
        m, n = (32, 16) if d <= 64 and key["pass"] != "bias" else (16, 16)
    elif d <= 64 and (arch.is_amd or arch.capability in (90, 100)):
        m, n = 64, 64
    elif d <= 128:
        m, n = (32, 64) if key["pass"] == "keys" else (64, 32)
    else:
        m, n = 32, 32
    warps = 4 if arch.is_amd or (min(m, n) < 32 and key["pass"] != "bias") else 8
    stages = 1 if arch.is_amd or wide or arch.shared_bytes < 80_000 else 2
    return Launch({"BLOCK_M": m, "BLOCK_N": n}, warps, stages)


def _key(which: str, q: torch.Tensor) -> dict[str, Any]:
    return {
        "pass": which,
        "dtype": str(q.dtype).removeprefix("torch."),
        "head_dim": q.shape[-1],
        "tokens": q.shape[1],
    }


def _launch(which: str, q: torch.Tensor) -> Launch:
    return launch_of(f"attention.{which}", arch_of(q.device), _key(which, q), launch_heuristic)


def _constants(dtype: torch.dtype, d: int, keep: bool, causal: bool) -> dict[str, Any]:
    d1, d2 = split_dim(d)
    return {
        "D": d,
        "D1": d1,
        "D2": d2,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "KEEP": keep,
        "CAUSAL": causal,
        "PRECISION": precision(dtype),
    }


def _on(t: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(t.device) if t.device.type == "cuda" else contextlib.nullcontext()


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


def _plain(call: Call) -> tuple[Call, bool]:
    """The call with q and k normalised and rotated, and whether there was anything to do."""
    if call.qk_norm or call.rope is not None:
        q, k, v = (t.transpose(1, 2) for t in prologue(call))
        return call._replace(q=q, k=k, v=v, qk_norm="", rope=None), True
    q, k, v = call.split()
    return call._replace(q=q, k=k, v=v), False


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    call, _ = _plain(call)
    q, k, v = call.q, call.k, call.v
    batch, queries, heads, d = q.shape
    keys = k.shape[1]
    out = q.new_empty(q.shape)
    wide = torch.promote_types(q.dtype, torch.float32)
    stats = q.new_empty((2, batch, heads, queries) if call.save_stats else (0,), dtype=wide)
    mask, bias, strides, keep = _addends(call, (batch, heads, queries, keys))
    launch = _launch("forward", q)
    grid = (triton.cdiv(queries, launch.blocks["BLOCK_M"]) * batch * heads,)
    with _on(q):
        kernels.forward_kernel[grid](
            q, k, v, mask, bias, out, stats if call.save_stats else None, batch, heads, queries,
            keys, call.scale, *q.stride(), *k.stride(), *v.stride(), *strides,
            **_constants(q.dtype, d, keep, call.is_causal), **launch.blocks, **launch.options(),
        )  # fmt: skip
    return out, stats


def backward(
    grad: torch.Tensor, call: Call, out: torch.Tensor, stats: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    if stats.device.type == "cpu" and stats[1, 0, 0, 0] < 0:
        out, stats = forward(call)  # the forward ran on another backend, which saves none
    plain, prepared = _plain(call)
    grads = {n: call.q.new_empty(0) for n in INPUTS}
    if call.k is None and not prepared:
        grads["q"] = call.q.new_empty(call.q.shape)
        dq, dk, dv = grads["q"].unbind(2)
    else:
        dq, dk, dv = (t.new_empty(t.shape) for t in (plain.q, plain.k, plain.v))
        grads |= {"q": dq, "k": dk, "v": dv}
    dbias = _launch_backward(grad, plain, out, stats, dq, dk, dv)
    if dbias is not None:
        grads["bias"] = dbias.view(call.bias.shape).to(call.bias.dtype)
    if prepared:
        grads |= _through_prologue(call, dq, dk, dv)
    return tuple(grads.values())


def _launch_backward(grad, call, out, stats, dq, dk, dv):
    """Writes dq, dk and dv; gives the bias's gradient [H, Nq, Nk], or None."""
    q, k, v = call.q, call.k, call.v
    batch, queries, heads, d = q.shape
    keys = k.shape[1]
    mask, bias, strides, keep = _addends(call, (batch, heads, queries, keys))
    constants = _constants(q.dtype, d, keep, call.is_causal)
    wide = stats.dtype
    delta = q.new_empty((batch, heads, queries), dtype=wide)
    sizes = (batch, heads, queries, keys, call.scale)
    inputs = (q, k, v, mask, bias, grad, stats, delta)
    steps = (*q.stride(), *k.stride(), *v.stride(), *grad.stride())
    with _on(q):
        kernels.delta_kernel[(triton.cdiv(queries, 16) * batch * heads,)](
            out, grad, delta, heads, queries, *grad.stride(), D=d,
            BLOCK_D=triton.next_power_of_2(d), ACC=constants["ACC"], BLOCK_M=16, num_warps=4,
        )  # fmt: skip
        launch = _launch("keys", q)
        kernels.keys_kernel[(triton.cdiv(keys, launch.blocks["BLOCK_N"]) * batch * heads,)](
            *inputs, dk, dv, *sizes, *steps, *dk.stride()[:3], *dv.stride()[:3], *strides,
            **constants, **launch.blocks, **launch.options(),
        )  # fmt: skip
        launch = _launch("queries", q)
        kernels.queries_kernel[(triton.cdiv(queries, launch.blocks["BLOCK_M"]) * batch * heads,)](
            *inputs, dq, *sizes, *steps, *dq.stride()[:3], *strides,
            **constants, **launch.blocks, **launch.options(),
        )  # fmt: skip
        if not wants_gradient(call, "bias"):
            return None
        launch = _launch("bias", q)
        m, n = launch.blocks["BLOCK_M"], launch.blocks["BLOCK_N"]
        dbias = q.new_empty((heads, queries, keys), dtype=wide)
        kernels.bias_kernel[(triton.cdiv(queries, m) * triton.cdiv(keys, n) * heads,)](
            *inputs, dbias, *sizes, *steps, *strides,
            **constants, **launch.blocks, **launch.options(),
        )  # fmt: skip
    return dbias


def _through_prologue(call, dq, dk, dv):
    """Gradients before norm and rotation, and those of the norms' weights."""
    names = [n for n in INPUTS if n not in ("mask", "bias", "rope") and wants_gradient(call, n)]
    found = gradients(
        lambda *leaves: prologue(call._replace(**dict(zip(names, leaves, strict=True)))),
        [getattr(call, n) for n in names],
        [t.transpose(1, 2) for t in (dq, dk, dv)],
    )
    absent = call.q.new_empty(0)
    return {"k": absent, "v": absent, **dict(zip(names, found, strict=True))}


def variants(arch: Arch) -> list[Variant]:
    """Every pass x head dim x dtype; with a bias for the passes that serve BEiT."""
    found = []
    for which in ("forward", "keys", "queries", "bias"):
        kernel = getattr(kernels, f"{which}_kernel")
        for d in HEAD_DIMS:
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                for bias in (True,) if which == "bias" else (False, True) if d == 64 else (False,):
                    found.append(_variant(arch, which, kernel, d, dtype, bias))
    return found


def _variant(arch, which, kernel, d, dtype, bias):
    key = {
        "pass": which, "dtype": str(dtype).removeprefix("torch."), "head_dim": d, "tokens": 1024
    }  # fmt: skip
    launch = launch_of(f"attention.{which}", arch, key, launch_heuristic)
    constants = {**_constants(dtype, d, False, False), **launch.blocks}
    # Contiguous head dims, as of a packed qkv.
    constants |= {n: 1 for n in kernel.arg_names if n in ("q_d", "k_d", "v_d", "grad_d", "bias_k")}
    constants["mask_ptr"] = None
    if not bias:
        constants["bias_ptr"] = None
    signature = {}
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            wide = name in ("stats_ptr", "delta_ptr", "dbias_ptr")
            signature[name] = "*fp32" if wide else f"*{NAMES[dtype]}"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    name = f"{which}-d{d}-{NAMES[dtype]}{'-bias' if bias and which != 'bias' else ''}"
    return Variant(name, kernel, signature, constants, launch, dots=dtype != torch.float32)
