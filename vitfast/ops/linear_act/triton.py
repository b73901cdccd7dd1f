"""linear_act on the Triton kernels of triton_kernels.py: launches, and what is compiled."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vitfast.ops.linear_act.triton_kernels import backward_kernel, forward_kernel
from vitfast.runtime.launches import Arch, Launch, Variant, arch_of, launch_of
from vitfast.runtime.triton import NAMES, guard, precision

ACTS = {
    "none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "quick_gelu": 4, "silu": 5, "sigmoid": 6,
}  # fmt: skip
_PROGRAMS = 512
"""Most row blocks of the backward: each leaves one row of partial sums."""


def launch_heuristic(arch: Arch, key: dict[str, Any]) -> Launch:
    """Tiles by dtype and architecture; a gate holds two sums."""
    wide, gated = key["dtype"] in ("float32", "float64"), key["gate"] == "yes"
    if arch.name == "interpreter":
        return Launch({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP": 8}, 4, 1)
    if wide:
        m, n, k, warps = (32, 64, 16, 4) if gated else (64, 64, 16, 4)
    elif arch.name in ("gfx1100", "gfx1201"):
        m, n, k, warps = (64, 32, 32, 4) if gated else (64, 64, 32, 4)
    else:
        m, n, k, warps = (64, 64, 32, 8) if gated else (128, 64, 32, 8)
    stages = 2 if arch.is_amd or wide else 3
    return Launch({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}, warps, stages)


def _launch(x: torch.Tensor, rows: int, cols: int, gated: bool) -> Launch:
    key = {
        "dtype": str(x.dtype).removeprefix("torch."),
        "gate": "yes" if gated else "no",
        "m": rows,
        "n": cols,
        "k": x.shape[-1],
    }
    return launch_of("linear_act.forward", arch_of(x.device), key, launch_heuristic)


def _acc(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _flat(t: torch.Tensor) -> torch.Tensor:
    """[..., C] as [M, C], a view where strides allow it."""
    return t.reshape(-1, t.shape[-1])


def _halves(weight, bias, gate_weight, gate_bias, gate):
    """(value, its bias), (gate or None, its bias): the gate is what passes through act."""
    if gate_weight is not None:
        return (weight, bias), (gate_weight, gate_bias)
    if not gate:
        return (weight, bias), (None, None)
    weights = weight.chunk(2)
    biases = (None, None) if bias is None else bias.contiguous().chunk(2)
    first, second = zip(weights, biases, strict=True)
    return (second, first) if gate == "first" else (first, second)


def _places(gate_weight, gate, n: int) -> tuple[int, int]:
    """Columns of z at which the value's and the gate's pre-activations begin."""
    if gate_weight is None and not gate:
        return 0, 0
    return (0, n) if gate == "last" else (n, 0)


def forward(x, weight, bias, gate_weight, gate_bias, act, gate, save_z):
    lead, n = x.shape[:-1], weight.shape[0] // (2 if gate else 1)
    gated = bool(gate) or gate_weight is not None
    y = x.new_empty((*lead, n))
    save = save_z and (gated or act != "none")
    z = x.new_empty((*lead, 2 * n if gated else n) if save else 0)
    if not y.numel():
        return y, z
    (w, b), (gw, gb) = _halves(weight.flatten(1), bias, gate_weight, gate_bias, gate)
    gw = gw if gw is None else gw.flatten(1)
    b, gb = (t if t is None else t.contiguous() for t in (b, gb))
    rows = _flat(x)
    m, k = rows.shape
    launch = _launch(rows, m, n, gated)
    grid = (triton.cdiv(m, launch.blocks["BLOCK_M"]) * triton.cdiv(n, launch.blocks["BLOCK_N"]),)
    with guard(x):
        forward_kernel[grid](
            rows, w, b, gw, gb, y, z if save else None, m, n, k, *rows.stride(), *w.stride(),
            *((0, 0) if gw is None else gw.stride()), z.shape[-1],
            *_places(gate_weight, gate, n), ACT=ACTS[act], ACC=_acc(x.dtype),
            PRECISION=precision(x.dtype), **launch.blocks, **launch.options(),
        )  # fmt: skip
    return y, z


def backward(grad, x, weight, bias, gate_weight, gate_bias, z, act, gate, wanted):
    tensors = (x, weight, bias, gate_weight, gate_bias)
    if not grad.numel():
        return tuple(
            t.new_zeros(t.shape) if w and t is not None else x.new_empty(0)
            for t, w in zip(tensors, wanted, strict=True)
        )
    gated = bool(gate) or gate_weight is not None
    rows, grad, n = _flat(x), _flat(grad), grad.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    if act == "none" and not gated:
        dz = grad
        sums = grad.sum(0, dtype=wide) if wanted[2] else None
    else:
        dz, sums = _pre_activation_gradient(grad, z, gate_weight, act, gate, gated, wide)
    found = [x.new_empty(0) for _ in tensors]
    parts = [(weight, dz, 1)]
    if gate_weight is not None:
        parts = [(gate_weight, dz[:, :n], 3), (weight, dz[:, n:], 1)]
        sums = sums.view(2, n).flip(0).flatten()  # value's first, as parts of one vector below
    if wanted[0]:
        dx = None
        for w, d, _ in parts:
            product = d @ w.flatten(1).to(d.dtype)
            dx = product if dx is None else dx + product
        found[0] = dx.view(x.shape)
    for w, d, at in parts:
        if wanted[at]:
            found[at] = (d.mT @ rows).view(w.shape).to(w.dtype)
    if wanted[2]:
        found[2] = sums[: bias.numel()].to(bias.dtype)
    if wanted[4]:
        found[4] = sums[n:].to(gate_bias.dtype)
    return tuple(found)


_BACKWARD = Launch({"BLOCK_M": 16, "BLOCK_N": 128}, 4, 1)


def _pre_activation_gradient(grad, z, gate_weight, act, gate, gated, wide):
    """dz [M, N or 2N], and its sums over rows in the order of z's columns."""
    m, n = grad.shape
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    dz = z.new_empty((m, z.shape[-1]))
    blocks = min(triton.cdiv(m, _BACKWARD.blocks["BLOCK_M"]), _PROGRAMS)
    across = triton.cdiv(n, _BACKWARD.blocks["BLOCK_N"])
    partial = z.new_empty((2 if gated else 1, blocks, n), dtype=wide)
    value, through = _places(gate_weight, gate, n)
    with guard(grad):
        backward_kernel[(across * blocks,)](
            grad, z, dz, partial[0], partial[1] if gated else None, m, n, grad.stride(0),
            z.shape[-1], value, through, ACT=ACTS[act], ACC=_acc(grad.dtype), GATED=gated,
            **_BACKWARD.blocks, **_BACKWARD.options(),
        )  # fmt: skip
    sums = partial.sum(1, dtype=torch.float64)
    if gated and value > through:
        sums = sums.flip(0)
    return dz, sums.flatten()


# ---- ahead of time -------------------------------------------------------------------------------


def variants(arch: Arch) -> list[Variant]:
    """Every activation, and GEGLU and SwiGLU, in each dtype, forward and backward; fc1 of ViT-B."""
    found = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for act, gated in (*((act, False) for act in ACTS), ("gelu", True), ("silu", True)):
            found.append(_forward_variant(arch, dtype, act, gated))
            if act != "none":
                found.append(_backward_variant(dtype, act, gated))
    return found


def _signature(kernel, constants, wide):
    return {
        name: ("*fp32" if name.startswith(("sums", "gate_sums")) else f"*{wide}")
        if name.endswith("_ptr")
        else "i32"
        for name in kernel.arg_names
        if name not in constants
    }


def _forward_variant(arch, dtype, act, gated):
    key = {
        "dtype": str(dtype).removeprefix("torch."), "gate": "yes" if gated else "no",
        "m": 4096, "n": 3072, "k": 768,
    }  # fmt: skip
    launch = launch_of("linear_act.forward", arch, key, launch_heuristic)
    constants = {
        "ACT": ACTS[act], "ACC": tl.float32, "PRECISION": "ieee", "x_k": 1, "w_k": 1, "gate_k": 1,
        **launch.blocks,
    }  # fmt: skip
    if not gated:
        constants |= {"gate_w_ptr": None, "gate_bias_ptr": None}
    signature = _signature(forward_kernel, constants, NAMES[dtype])
    name = f"forward-{act}{'-gated' if gated else ''}-{NAMES[dtype]}"
    return Variant(name, forward_kernel, signature, constants, launch, dots=dtype != torch.float32)


def _backward_variant(dtype, act, gated):
    constants = {
        "ACT": ACTS[act], "ACC": tl.float32, "GATED": gated, **_BACKWARD.blocks
    }  # fmt: skip
    if not gated:
        constants["gate_sums_ptr"] = None
    signature = _signature(backward_kernel, constants, NAMES[dtype])
    name = f"backward-{act}{'-gated' if gated else ''}-{NAMES[dtype]}"
    return Variant(name, backward_kernel, signature, constants, _BACKWARD)
