"""linear_act in Triton: a product with bias, activation or gate in its epilogue.

Floor: 2 M N K flops; bytes are x, W and y once, and z once where training keeps it. What the
epilogue saves is a pass over 2 M N elements (gated 3 M N). The backward's pass from grad and z to
dz reads two tensors and writes one; its products are the vendor's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vitfast.runtime.launches import Arch, Launch, Variant, arch_of, launch_of
from vitfast.runtime.triton import COUNTS, NAMES, guard, precision

ACTS = {
    "none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "quick_gelu": 4, "silu": 5, "sigmoid": 6,
}  # fmt: skip
_PROGRAMS = 512
"""Most row blocks of the backward: each leaves one row of partial sums."""


@triton.jit
def _sigmoid(x):
    """Without an overflow: exp of what is not positive only."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _bell(x):
    """The derivative of the sigmoid, without the cancellation of 1 - s."""
    e = tl.exp(-tl.abs(x))
    return e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _activate(x, ACT: tl.constexpr):
    if ACT == 1:
        x = tl.where(x > 0, x, x * 0.0)  # NaN stays NaN
    elif ACT == 2:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == 3:
        x = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == 4:
        x = x * _sigmoid(1.702 * x)
    elif ACT == 5:
        x = x * _sigmoid(x)
    elif ACT == 6:
        x = _sigmoid(x)
    return x


@triton.jit
def _slope(x, ACT: tl.constexpr):
    """The activation's derivative."""
    if ACT == 1:
        d = tl.where(x > 0, 1.0, x * 0.0)
    elif ACT == 2:
        bell = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        d = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * bell
    elif ACT == 3:
        u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        d = _sigmoid(u) + tl.where(tl.abs(x) > 1e4, 0.0, x * _bell(u) * inner)
    elif ACT == 4:
        d = _sigmoid(1.702 * x) + 1.702 * x * _bell(1.702 * x)
    elif ACT == 5:
        d = _sigmoid(x) + x * _bell(x)
    elif ACT == 6:
        d = _bell(x)
    else:
        d = x * 0.0 + 1.0
    return d


@triton.jit
def _weights(w_ptr, n, k, cols, depth, stride_n, stride_k, DTYPE: tl.constexpr):
    """A [k, n] tile of W^T; float32 weights are rounded as autocast rounds them."""
    at = n.to(tl.int64)[None, :] * stride_n + k.to(tl.int64)[:, None] * stride_k
    return tl.load(w_ptr + at, mask=(k < depth)[:, None] & (n < cols)[None, :], other=0.0).to(DTYPE)


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    x_ptr, w_ptr, bias_ptr, gate_w_ptr, gate_bias_ptr, y_ptr, z_ptr, rows, cols, depth,
    x_m, x_k, w_n, w_k, gate_n, gate_k, z_m, z_value, z_gate,
    ACT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = act(x W^T + b), or act(x Wg^T + bg) * (x W^T + b) with a gate."""
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(cols, BLOCK_N)
    pid = tl.program_id(0)
    # Neighbouring programs share tiles of both operands in the L2 cache.
    group = pid // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    m = (group * GROUP + pid % (GROUP * across) % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (pid % (GROUP * across) // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = m.to(tl.int64)[:, None] * x_m
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    gate = total
    for first in range(0, depth, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        mask = (m < rows)[:, None] & (k < depth)[None, :]
        x = tl.load(x_ptr + start + k.to(tl.int64)[None, :] * x_k, mask=mask, other=0.0)
        w = _weights(w_ptr, n, k, cols, depth, w_n, w_k, x.dtype)
        total = tl.dot(x, w, acc=total, out_dtype=ACC, input_precision=PRECISION)
        if gate_w_ptr is not None:
            w = _weights(gate_w_ptr, n, k, cols, depth, gate_n, gate_k, x.dtype)
            gate = tl.dot(x, w, acc=gate, out_dtype=ACC, input_precision=PRECISION)
    inside = n < cols
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=inside, other=0.0).to(y_ptr.dtype.element_ty).to(ACC)
    out = m.to(tl.int64)[:, None] * cols + n[None, :]
    mask = (m < rows)[:, None] & inside[None, :]
    if z_ptr is not None:
        at = m.to(tl.int64)[:, None] * z_m + n[None, :]
        tl.store(z_ptr + at + z_value, total.to(z_ptr.dtype.element_ty), mask=mask)
    if gate_w_ptr is not None:
        if gate_bias_ptr is not None:
            b = tl.load(gate_bias_ptr + n, mask=inside, other=0.0).to(y_ptr.dtype.element_ty)
            gate += b.to(ACC)
        if z_ptr is not None:
            tl.store(z_ptr + at + z_gate, gate.to(z_ptr.dtype.element_ty), mask=mask)
        y = _activate(gate, ACT) * total
    else:
        y = _activate(total, ACT)
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    grad_ptr, z_ptr, dz_ptr, sums_ptr, gate_sums_ptr, rows, cols, grad_m, z_m, z_value, z_gate,
    ACT: tl.constexpr, ACC: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dz from grad and z, and each row block's sums for the biases' gradients."""
    across = tl.cdiv(cols, BLOCK_N)
    n = (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(0) // across
    blocks = tl.num_programs(0) // across
    inside = n < cols
    sums = tl.zeros([BLOCK_N], ACC)
    gate_sums = tl.zeros([BLOCK_N], ACC)
    for first in range(block, tl.cdiv(rows, BLOCK_M), blocks):
        m = tl.arange(0, BLOCK_M).to(tl.int64) + first * BLOCK_M
        mask = (m < rows)[:, None] & inside[None, :]
        at = m[:, None] * z_m + n[None, :]
        d = tl.load(grad_ptr + m[:, None] * grad_m + n[None, :], mask=mask, other=0.0).to(ACC)
        z = tl.load(z_ptr + at + z_value, mask=mask, other=0.0).to(ACC)
        if GATED:
            g = tl.load(z_ptr + at + z_gate, mask=mask, other=0.0).to(ACC)
            dg = d * z * _slope(g, ACT)
            d = d * _activate(g, ACT)
            tl.store(dz_ptr + at + z_gate, dg.to(dz_ptr.dtype.element_ty), mask=mask)
            gate_sums += tl.sum(tl.where(mask, dg, 0.0), axis=0)
        else:
            d = d * _slope(z, ACT)
        tl.store(dz_ptr + at + z_value, d.to(dz_ptr.dtype.element_ty), mask=mask)
        sums += tl.sum(tl.where(mask, d, 0.0), axis=0)
    at = block.to(tl.int64) * cols + n
    tl.store(sums_ptr + at, sums, mask=inside)
    if GATED:
        tl.store(gate_sums_ptr + at, gate_sums, mask=inside)


# ---- launches ------------------------------------------------------------------------------------


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
