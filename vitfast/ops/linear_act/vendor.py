"""linear_act on oneDNN, through the op that PyTorch's own compiler uses for it on CPUs."""

from __future__ import annotations

import torch

from vitfast.ops.common.autodiff import gradients
from vitfast.ops.linear_act.reference import (
    ACTIVATIONS,
    BackwardCall,
    Call,
    activate,
    activate_packed,
)
from vitfast.runtime.dispatch import Backend

_MOST_SUMMED = 256 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 192
"""Products that oneDNN may sum in float32 at a time: it adds them up one after the other, where MKL
adds up blocks.

Not `EXACT_WIDTH` of `engine.products.onednn`, since other errors are allowed: there, in inference,
up to twice the rms error of `torch.nn.functional.linear`; of a backend, which training uses too,
1.25 times (`OpSpec.rms_factor`). Against float64 on AVX2, where MKL's blocks are smaller (197 x K
times K x 256 and 384, three seeds), pieces of 192 have 1.00 times that error for every K from 384
on. Pieces of 256 have 1.06 to 1.19 times, but 1.27 to 1.41 for K from 208 to 288; 384 has 1.32 to
1.41 times, 768 1.64 to 1.97 times, 1024 1.95 to 2.33 times. With AVX-512 chains of 768 have 1.5
times.
"""


def available() -> list[str]:
    if not torch.backends.mkldnn.is_available():
        return ["this PyTorch was built without oneDNN"]
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ["this PyTorch has no mkldnn::_linear_pointwise"]
    return []


def can_run(call: Call) -> list[str]:
    x, why = call.x, available()
    if not torch.backends.mkldnn.enabled:
        why.append("torch.backends.mkldnn is disabled")
    if x.device.type != "cpu":
        why.append(f"tensors are on {x.device}, not on the CPU")
    if x.dtype not in (torch.float32, torch.bfloat16):
        why.append(f"{x.dtype} is not implemented, float32 and bfloat16 are")
    elif x.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        why.append("oneDNN has no bfloat16 on this CPU")
    if not (x.numel() and call.weight.numel()):
        why.append("there is nothing to multiply")
    return why


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    empty = call.x.new_empty(0)
    z = _linear(call.x, call.weight, call.bias)
    if call.gate_weight is not None:
        gate_z = _linear(call.x, call.gate_weight, call.gate_bias)
        saved = torch.cat((gate_z, z), -1) if call.save_z else empty
        return activate(gate_z, z, call.act, "first"), saved
    saved = z if call.save_z and call.saved_width is not None else empty
    if call.gate:
        return activate_packed(z, call.act, call.gate), saved
    return ACTIVATIONS[call.act](z), saved


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    weight = weight.flatten(1).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    multiply = torch.ops.mkldnn._linear_pointwise
    k = weight.shape[1]
    if x.dtype != torch.float32 or k <= _MOST_SUMMED:
        return multiply(x, weight, bias, "none", [], "")
    y: torch.Tensor | None = None
    for begin in range(0, k, _MOST_SUMMED):
        part = slice(begin, begin + _MOST_SUMMED)
        some, w = x[..., part].contiguous(), weight[:, part].contiguous()
        if y is None:
            y = multiply(some, w, bias, "none", [], "")
        else:
            y = multiply.binary(some, y, w, None, "add")
    assert y is not None  # k is not 0
    return y


def backward(call: BackwardCall) -> tuple[torch.Tensor, ...]:
    x, act, wanted = call.x, call.act, call.wanted
    rows, grad = x.reshape(-1, x.shape[-1]), call.grad.reshape(-1, call.grad.shape[-1])
    if call.gated:
        side = call.gate or "first"
        z = call.z.reshape(len(rows), -1)
        (dz,) = gradients(lambda z: activate_packed(z, act, side), (z,), (grad,))
    elif act != "none":
        (dz,) = gradients(ACTIVATIONS[act], (call.z.reshape(len(rows), -1),), (grad,))
    else:
        dz = grad
    n = call.weight.shape[0]
    parts = [(call.weight, call.bias, dz, 1)]
    if call.gate_weight is not None:
        parts = [
            (call.gate_weight, call.gate_bias, dz[:, :n], 3),
            (call.weight, call.bias, dz[:, n:], 1),
        ]
    found = [x.new_empty(0) for _ in range(5)]
    dx = None
    for w, b, d, at in parts:
        if wanted[0]:
            part = d @ w.flatten(1).to(d.dtype)
            dx = part if dx is None else dx + part
        if wanted[at]:
            found[at] = (d.mT @ rows).view(w.shape).to(w.dtype)
        if b is not None and wanted[at + 1]:
            found[at + 1] = d.sum(0, dtype=torch.float32).to(b.dtype)
    if dx is not None:
        found[0] = dx.view(x.shape)
    return tuple(found)


BACKEND = Backend("vendor", forward, can_run, backward, available)
