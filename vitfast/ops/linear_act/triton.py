"""linear_act on the Triton kernels of triton_kernels.py: launches, and what is compiled."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from vitfast.ops.linear_act.reference import INPUTS, BackwardCall, Call
from vitfast.ops.linear_act.triton_kernels import backward_kernel, forward_kernel
from vitfast.runtime import kernel_calls
from vitfast.runtime.kernel_calls import cdiv
from vitfast.runtime.launches import Arch, Launch, Variant, arch_of, launch_of
from vitfast.runtime.triton import NAMES, guard, precision

ACTS = {
    "none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "quick_gelu": 4, "silu": 5, "sigmoid": 6,
}  # fmt: skip
_PROGRAMS = 512
"""Most row blocks of the backward, each of which leaves one row of partial sums: several a
multiprocessor of the largest GPUs. Chosen, not measured yet."""

_DEEP = 4096
"""From more terms than this on, float32 sums 32 of them at a time instead of 16: a sum of many
sums of 16 has the rounding of many additions (of 12288 terms 1.3 times what may be). It takes
registers, so that fewer blocks run at once on sm_80 and sm_90."""


def launch_heuristic(arch: Arch, key: dict[str, Any]) -> Launch:
    """Tiles by dtype and architecture; a gate holds two sums.

    They spill nothing but on sm_75, where no matrix instructions are (tests/gpu/resources.json).
    Of the tiles for which that is so these were chosen; none has been timed yet.
    """
    wide, gated = key["dtype"] in ("float32", "float64"), key["gate"] == "yes"
    if arch.name == "interpreter":
        return Launch({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP": 8}, 4, 1)
    if wide:
        m, n, k, warps = (32, 64, 16, 4) if gated else (64, 64, 32 if key["k"] > _DEEP else 16, 4)
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


_Layer = tuple[torch.Tensor, torch.Tensor | None]
"""A weight [N, K], any strides, and its bias [N], contiguous."""


def _layers(call: Call) -> tuple[_Layer, _Layer | None]:
    """The layer of the value, and that of the gate, which is what passes through act."""
    value = (call.weight.flatten(1), _contiguous(call.bias))
    if call.gate_weight is not None:
        return value, (call.gate_weight.flatten(1), _contiguous(call.gate_bias))
    if not call.gate:
        return value, None
    weights = value[0].chunk(2)
    biases = (None, None) if value[1] is None else value[1].chunk(2)
    first, second = zip(weights, biases, strict=True)
    return (second, first) if call.gate == "first" else (first, second)


def _contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()


def _places(call: Call | BackwardCall, n: int) -> tuple[int, int]:
    """Columns of z at which the value's and the gate's pre-activations begin, each n wide."""
    if not call.gated:
        return 0, 0
    return (0, n) if call.gate == "last" else (n, 0)


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    x, n, width = call.x, call.width, call.saved_width
    lead = x.shape[:-1]
    y = x.new_empty((*lead, n))
    save = call.save_z and width is not None
    z = x.new_empty((*lead, width) if save else 0)
    if not y.numel():
        return y, z
    (w, bias), gate = _layers(call)
    gate_w, gate_bias = (None, None) if gate is None else gate
    rows = _flat(x)
    m, k = rows.shape
    config = _launch(rows, m, n, call.gated)
    programs = cdiv(m, config.blocks["BLOCK_M"]) * cdiv(n, config.blocks["BLOCK_N"])
    args = (
        rows, w, bias, gate_w, gate_bias, y, z if save else None, m, n, k,
        *rows.stride(), *w.stride(), *((0, 0) if gate_w is None else gate_w.stride()),
        z.shape[-1], *_places(call, n),
    )  # fmt: skip
    constants = {
        "ACT": ACTS[call.act], "ACC": _acc(x.dtype),
        "PRECISION": precision(x.dtype, arch_of(x.device)),
    }  # fmt: skip
    with guard(x):
        kernel_calls.launch(forward_kernel, programs, args, constants, config)
    return y, z


def backward(call: BackwardCall) -> tuple[torch.Tensor, ...]:
    x, wanted = call.x, call.wanted
    found = {name: x.new_empty(0) for name in INPUTS}
    if not call.grad.numel():
        for name, is_wanted in zip(INPUTS, wanted, strict=True):
            if is_wanted:
                t = getattr(call, name)
                found[name] = t.new_zeros(t.shape)
        return tuple(found.values())
    rows, grad, n = _flat(x), _flat(call.grad), call.grad.shape[-1]
    sums: torch.Tensor | None = None
    if call.act == "none" and not call.gated:
        dz = grad
        if wanted[2]:
            sums = grad.sum(0, dtype=torch.promote_types(x.dtype, torch.float32))
    else:
        dz, sums = _pre_activation_gradient(grad, call)
    parts = [("weight", call.weight, dz)]
    if call.gate_weight is not None:
        parts = [("gate_weight", call.gate_weight, dz[:, :n]), ("weight", call.weight, dz[:, n:])]
    if wanted[0]:
        products = [d @ w.flatten(1).to(d.dtype) for _, w, d in parts]
        found["x"] = sum(products[1:], products[0]).view(x.shape)
    for name, w, d in parts:
        if wanted[INPUTS.index(name)]:
            found[name] = (d.mT @ rows).view(w.shape).to(w.dtype)
    if call.bias is not None and sums is not None and wanted[2]:
        found["bias"] = sums[-call.bias.numel() :].to(call.bias.dtype)  # the gate's come first
    if call.gate_bias is not None and sums is not None and wanted[4]:
        found["gate_bias"] = sums[:n].to(call.gate_bias.dtype)
    return tuple(found.values())


_BACKWARD = Launch({"BLOCK_M": 16, "BLOCK_N": 128}, 4, 1)
"""2K elements a program, 16 a thread. Chosen, not measured yet."""


def _pre_activation_gradient(
    grad: torch.Tensor, call: BackwardCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """dz [M, N or 2N] for grad [M, N], and its sums over rows [N or 2N]; columns lie as in z."""
    z, gated = call.z, call.gated
    m, n = grad.shape
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    dz = z.new_empty((m, z.shape[-1]))
    blocks = min(cdiv(m, _BACKWARD.blocks["BLOCK_M"]), _PROGRAMS)
    across = cdiv(n, _BACKWARD.blocks["BLOCK_N"])
    wide = torch.promote_types(grad.dtype, torch.float32)
    partial = z.new_empty((2 if gated else 1, blocks, n), dtype=wide)
    value, through = _places(call, n)
    args = (
        grad, z, dz, partial[0], partial[1] if gated else None, m, n, grad.stride(0),
        z.shape[-1], value, through,
    )  # fmt: skip
    constants = {"ACT": ACTS[call.act], "ACC": _acc(grad.dtype), "GATED": gated}
    with guard(grad):
        kernel_calls.launch(backward_kernel, across * blocks, args, constants, _BACKWARD)
    # In float64, since as many rounding errors would meet here.
    sums = partial.sum(1, dtype=torch.float64)
    if gated and value > through:
        sums = sums.flip(0)
    return dz, sums.flatten()


# ---- ahead of time -------------------------------------------------------------------------------


def variants(arch: Arch) -> list[Variant]:
    """Every activation, and GEGLU and SwiGLU, in each dtype, forward and backward; fc1 of ViT-B.

    And a product of more than _DEEP terms, such as ConvNeXt-XL's fc2; and float32 weights beside
    half-precision inputs, as autocast leaves them.
    """
    found = [_forward_variant(arch, torch.float32, "none", False, depth=8192)]
    for dtype in (torch.float16, torch.bfloat16):
        found.append(_forward_variant(arch, dtype, "gelu", False, autocast=True))
        found.append(_forward_variant(arch, dtype, "silu", True, autocast=True))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for act, gated in (*((act, False) for act in ACTS), ("gelu", True), ("silu", True)):
            found.append(_forward_variant(arch, dtype, act, gated))
            if act != "none":
                found.append(_backward_variant(dtype, act, gated))
    return found


def _signature(kernel: Any, constants: dict[str, Any], wide: str) -> dict[str, str]:
    """Types of a kernel's arguments; `wide` is Triton's name of the tensors' dtype."""
    return {
        name: ("*fp32" if name.startswith(("sums", "gate_sums")) else f"*{wide}")
        if name.endswith("_ptr")
        else "i32"
        for name in kernel.arg_names
        if name not in constants
    }


def _forward_variant(
    arch: Arch,
    dtype: torch.dtype,
    act: str,
    gated: bool,
    *,
    depth: int = 768,
    autocast: bool = False,
) -> Variant:
    key: dict[str, int | str] = {
        "dtype": str(dtype).removeprefix("torch."), "gate": "yes" if gated else "no",
        "m": 4096, "n": 3072, "k": depth,
    }  # fmt: skip
    launch = launch_of("linear_act.forward", arch, key, launch_heuristic)
    constants: dict[str, Any] = {
        "ACT": ACTS[act], "ACC": tl.float32, "PRECISION": "ieee", "x_k": 1, "w_k": 1, "gate_k": 1,
        **launch.blocks,
    }  # fmt: skip
    if not gated:
        constants |= {"gate_w_ptr": None, "gate_bias_ptr": None}
    signature = _signature(forward_kernel, constants, NAMES[dtype])
    if autocast:
        weights = ("w_ptr", "bias_ptr", "gate_w_ptr", "gate_bias_ptr")
        signature |= {name: "*fp32" for name in weights if name in signature}
    form = ("-gated" if gated else "") + ("-deep" if depth > _DEEP else "")
    name = f"forward-{act}{form}-{NAMES[dtype]}{'-autocast' if autocast else ''}"
    return Variant(name, forward_kernel, signature, constants, launch, dots=dtype != torch.float32)


def _backward_variant(dtype: torch.dtype, act: str, gated: bool) -> Variant:
    constants: dict[str, Any] = {
        "ACT": ACTS[act], "ACC": tl.float32, "GATED": gated, **_BACKWARD.blocks
    }  # fmt: skip
    if not gated:
        constants["gate_sums_ptr"] = None
    signature = _signature(backward_kernel, constants, NAMES[dtype])
    name = f"backward-{act}{'-gated' if gated else ''}-{NAMES[dtype]}"
    return Variant(name, backward_kernel, signature, constants, _BACKWARD)
