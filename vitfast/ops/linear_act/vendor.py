"""linear_act on oneDNN, through the op that PyTorch's own compiler uses for it on CPUs."""

from __future__ import annotations

import torch

from vitfast.ops.common.autodiff import gradients
from vitfast.ops.linear_act.reference import ACTIVATIONS, activate
from vitfast.runtime.dispatch import Backend

_MOST_SUMMED = 256
"""Products that oneDNN may sum in float32 at a time. It adds them up one after the other: over 768
of them that makes 1.5 times, over 3072 2.2 times the rms error of a blocked BLAS."""


def available() -> list[str]:
    if not torch.backends.mkldnn.is_available():
        return ["this PyTorch was built without oneDNN"]
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ["this PyTorch has no mkldnn::_linear_pointwise"]
    return []


def can_run(x, weight, bias, gate_weight, gate_bias, act, gate, save_z):
    why = available()
    if not torch.backends.mkldnn.enabled:
        why.append("torch.backends.mkldnn is disabled")
    if x.device.type != "cpu":
        why.append(f"tensors are on {x.device}, not on the CPU")
    if x.dtype not in (torch.float32, torch.bfloat16):
        why.append(f"{x.dtype} is not implemented, float32 and bfloat16 are")
    elif x.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        why.append("oneDNN has no bfloat16 on this CPU")
    if not (x.numel() and weight.numel()):
        why.append("there is nothing to multiply")
    return why


def forward(x, weight, bias, gate_weight, gate_bias, act, gate, save_z):
    empty = x.new_empty(0)
    if gate_weight is not None:
        value, gate_value = _linear(x, weight, bias), _linear(x, gate_weight, gate_bias)
        z = torch.cat((gate_value, value), -1) if save_z else empty
        return activate(gate_value, value, act, "first"), z
    if gate:
        z = _linear(x, weight, bias)
        return activate(*z.chunk(2, -1), act, gate), z if save_z else empty
    z = _linear(x, weight, bias)
    return ACTIVATIONS[act](z), z if save_z and act != "none" else empty


def _linear(x, weight, bias):
    weight = weight.flatten(1).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    multiply = torch.ops.mkldnn._linear_pointwise
    k = weight.shape[1]
    if x.dtype != torch.float32 or k <= _MOST_SUMMED:
        return multiply(x, weight, bias, "none", [], "")
    y = None
    for begin in range(0, k, _MOST_SUMMED):
        part = slice(begin, begin + _MOST_SUMMED)
        some, w = x[..., part].contiguous(), weight[:, part].contiguous()
        if y is None:
            y = multiply(some, w, bias, "none", [], "")
        else:
            y = multiply.binary(some, y, w, None, "add")
    return y


def backward(grad, x, weight, bias, gate_weight, gate_bias, z, act, gate, wanted):
    rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    if gate or gate_weight is not None:
        side = gate or "first"
        z = z.reshape(len(rows), -1)
        (dz,) = gradients(lambda z: activate(*z.chunk(2, -1), act, side), (z,), (grad,))
    elif act != "none":
        (dz,) = gradients(ACTIVATIONS[act], (z.reshape(len(rows), -1),), (grad,))
    else:
        dz = grad
    n = weight.shape[0]
    parts = [(weight, bias, dz, 1)]
    if gate_weight is not None:
        parts = [(gate_weight, gate_bias, dz[:, :n], 3), (weight, bias, dz[:, n:], 1)]
    found = [x.new_empty(0) for _ in range(5)]
    dx = None
    for w, b, d, at in parts:
        if wanted[0]:
            part = d @ w.flatten(1).to(d.dtype)
            dx = part if dx is None else dx + part
        if wanted[at]:
            found[at] = (d.mT @ rows).view(w.shape).to(w.dtype)
        if wanted[at + 1]:
            found[at + 1] = d.sum(0, dtype=torch.float32).to(b.dtype)
    if dx is not None:
        found[0] = dx.view(x.shape)
    return tuple(found)


BACKEND = Backend("vendor", forward, can_run, backward, available)
