"""linear_act on oneDNN, through the op that PyTorch's own compiler uses for it on CPUs."""

from __future__ import annotations

from functools import partial

import torch

from vitfast.ops.linear_act import reference
from vitfast.ops.linear_act.reference import Call
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


BACKEND = Backend(
    "vendor",
    partial(reference.forward, linear=_linear),
    can_run,
    reference.backward,
    available,
)
