"""Windowed attention on the kernels of csrc/cpu/window_forward.cpp and window_backward.cpp."""

from __future__ import annotations

import torch

from vitfast.ops.window_attention.reference import LARGEST_SCALE, factors
from vitfast.runtime.dispatch import Backend
from vitfast.runtime.native import DTYPE_CODES, address, native, reasons, threads


def can_run(qkv, window, shift, table, pad, logit_scale, scale, roll_first, save_stats):
    why = reasons()
    if qkv.device.type != "cpu":
        why.append(f"qkv is on {qkv.device}; the kernels run on the CPU")
    if qkv.dtype not in (torch.float32, torch.bfloat16):
        why.append(f"qkv has dtype {qkv.dtype}; the kernels take float32 and bfloat16")
    if qkv.shape[-1] > 256:
        why.append(f"head dim {qkv.shape[-1]} is above 256")
    if window[0] * window[1] > 1 << 16:
        why.append(f"a window of {window[0]} x {window[1]} tokens; the kernels take 65,536")
    return why


def forward(qkv, window, shift, table, pad, logit_scale, scale, roll_first, save_stats):
    batch, high, wide, _, heads, dim = qkv.shape
    out = qkv.new_empty(batch, high, wide, heads, dim)
    stats = qkv.new_empty(stats_shape(qkv, window) if save_stats else 0, dtype=torch.float32)
    keep: list[torch.Tensor] = []  # converted tensors have to outlive the call
    problem = _problem(keep, qkv, window, shift, table, pad, logit_scale, scale, roll_first)
    native().window_forward(problem, out.data_ptr(), address(stats), threads())
    return out, stats


def backward(
    grad, out, stats, qkv, window, shift, table, pad, logit_scale, scale, roll_first, wanted
):  # fmt: skip
    if stats.flatten()[-1] < 0:  # the forward ran on another backend, which saves none
        out, stats = forward(qkv, window, shift, table, pad, logit_scale, scale, roll_first, True)
    keep: list[torch.Tensor] = []
    problem = _problem(keep, qkv, window, shift, table, pad, logit_scale, scale, roll_first)
    grad = grad.contiguous()
    dqkv = qkv.new_empty(qkv.shape)
    sums = [
        qkv.new_empty((*t.shape[1:], *t.shape[:1]) if t is table else t.shape, dtype=torch.float32)
        if t is not None and w
        else None
        for t, w in zip((table, pad, logit_scale), wanted[1:], strict=True)
    ]
    native().window_backward(
        problem, out.data_ptr(), stats.data_ptr(), grad.data_ptr(), dqkv.data_ptr(),
        *map(address, sums), threads(),
    )  # fmt: skip
    dtable, dpad, dscale = sums
    if dtable is not None:
        dtable = dtable.t().contiguous().to(table.dtype)
    if dpad is not None:
        dpad = dpad.to(pad.dtype)
    if dscale is not None:  # of exp(min(x, largest))
        x = logit_scale.float()
        below = x <= LARGEST_SCALE
        dscale = (dscale * x.clamp(max=LARGEST_SCALE).exp() * below).to(logit_scale.dtype)
    found = (dqkv, dtable, dpad, dscale)
    return tuple(qkv.new_empty(0) if t is None else t for t in found)


def _problem(keep, qkv, window, shift, table, pad, logit_scale, scale, roll_first):
    """`WindowProblem` of csrc/bindings.cpp; keeps what it converts."""
    batch, high, wide, _, heads, dim = qkv.shape
    qkv = qkv if qkv.stride(-1) == 1 or dim == 1 else qkv.contiguous()
    f32 = torch.float32
    by_head = factors(logit_scale, heads, dim, scale, f32, qkv.device).contiguous()
    by_position = None if table is None else table.to(f32).t().contiguous()
    padding = None if pad is None else pad.to(f32).contiguous()
    sb, sy, sx, s3, sh, _ = qkv.stride()
    problem = (
        DTYPE_CODES[qkv.dtype], (batch, high, wide, heads, dim), (*window, *shift), roll_first,
        logit_scale is not None, qkv.data_ptr(), (sb, sy, sx, s3, sh), by_head.data_ptr(),
        address(by_position), address(padding),
    )  # fmt: skip
    keep += [t for t in (qkv, by_head, by_position, padding) if t is not None]
    return problem


def stats_shape(qkv: torch.Tensor, window: tuple[int, int]) -> tuple[int, ...]:
    batch, high, wide, _, heads, _ = qkv.shape
    windows = -(-high // window[0]) * -(-wide // window[1])
    return 2, batch, windows, heads, window[0] * window[1]


BACKEND = Backend("cpu", forward, can_run, backward, reasons)
