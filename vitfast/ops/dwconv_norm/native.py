"""dwconv_norm on torch's convolution and the kernels of csrc/cpu/norm.h."""

from __future__ import annotations

import torch

from vitfast.ops import _norm
from vitfast.ops.dwconv_norm.reference import convolve
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend
from vitfast.runtime.library import without_autocast


def can_run(x, weight, bias, norm_weight, norm_bias, eps, norm, dtype, out_dtype, save_stats):
    why = _norm.reasons(x, weight, bias, norm_weight, norm_bias, out_dtype=out_dtype)
    if dtype not in _norm.DTYPES:
        why.append(f"{dtype} is not implemented, float32 and bfloat16 are")
    return why


def _convolved(x, weight, bias, dtype):
    x, weight, bias = (None if t is None else t.to(dtype).float() for t in (x, weight, bias))
    with without_autocast(x.device):
        return convolve(x, weight, bias).contiguous()


def forward(x, weight, bias, norm_weight, norm_bias, eps, norm, dtype, out_dtype, save_stats):
    z = _convolved(x, weight, bias, dtype)
    if norm is None:
        return z.to(out_dtype), _norm.absent(x)
    _, y, stats = _norm.forward(
        _norm.KINDS[norm], z, weight=norm_weight, bias=norm_bias, eps=eps, out_dtype=out_dtype,
        save_stats=save_stats,
    )  # fmt: skip
    return y, _norm.absent(x) if stats is None else stats


def backward(grad, x, weight, bias, norm_weight, norm_bias, eps, norm, dtype, stats, wanted):
    dz, dnorm_weight, dnorm_bias = grad.float(), grad.new_empty(0), grad.new_empty(0)
    if norm is not None:
        dz, _, _, dnorm_weight, dnorm_bias = _norm.backward(
            _norm.KINDS[norm], grad, _convolved(x, weight, bias, dtype), stats,
            weight=norm_weight, bias=norm_bias, eps=eps,
        )  # fmt: skip
    if x.numel() == 0:
        dconv = [t if t is None else torch.zeros_like(t) for t in (x, weight, bias)]
    else:
        with without_autocast(x.device):
            dconv = torch.ops.aten.convolution_backward(
                dz.permute(0, 3, 1, 2), x.to(dtype).float().permute(0, 3, 1, 2),
                weight.to(dtype).float(), [x.shape[3]], [1, 1],
                [size // 2 for size in weight.shape[2:]], [1, 1], False, [0, 0], x.shape[3],
                [wanted[0], wanted[1], wanted[2]],
            )  # fmt: skip
    found = (
        dconv[0] if x.numel() == 0 or dconv[0] is None else dconv[0].permute(0, 2, 3, 1),
        *dconv[1:], dnorm_weight, dnorm_bias,
    )  # fmt: skip
    inputs = (x, weight, bias, norm_weight, norm_bias)
    return tuple(
        g.to(t.dtype).contiguous() if w else grad.new_empty(0)
        for g, t, w in zip(found, inputs, wanted, strict=True)
    )


BACKEND = Backend("cpu", forward, can_run, backward, native.reasons)
