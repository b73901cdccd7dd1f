"""Windowed attention on the kernels of csrc/cpu/window_forward.cpp and window_backward.cpp."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from vitfast.ops.window_attention.reference import LARGEST_SCALE, BackwardCall, Call, factors
from vitfast.runtime.dispatch import Backend
from vitfast.runtime.native import DTYPE_CODES, address, native, reasons, threads

MOST_TOKENS = 1 << 16
"""Most tokens of a window, as csrc checks too: it then has at most 2^32 pairs of them. Chosen, far
above the 576 of Swin V2's largest windows."""


def can_run(call: Call) -> list[str]:
    """Why the kernels cannot take this call; empty when they can."""
    why = reasons()
    qkv = call.qkv
    if qkv.device.type != "cpu":
        why.append(f"qkv is on {qkv.device}; the kernels run on the CPU")
    if qkv.dtype not in (torch.float32, torch.bfloat16):
        why.append(f"qkv has dtype {qkv.dtype}; the kernels take float32 and bfloat16")
    if qkv.shape[-1] > 256:
        why.append(f"head dim {qkv.shape[-1]} is above 256")
    if call.wh * call.ww > MOST_TOKENS:
        why.append(f"a window of {call.wh} x {call.ww} tokens; the kernels take {MOST_TOKENS}")
    return why


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The result [B, H, W, heads, D] and the statistics of `Call.stats_shape`, float32."""
    qkv = call.qkv
    batch, high, wide, _, heads, dim = qkv.shape
    out = qkv.new_empty(batch, high, wide, heads, dim)
    stats = qkv.new_empty(call.stats_shape, dtype=torch.float32)
    run(
        qkv, out, (high, wide), call.window, call.shift, _terms_of(call),
        roll_first=call.roll_first, grid=call.grid, stats=stats,
    )  # fmt: skip
    return out, stats


class Terms(NamedTuple):
    """What the kernels add to and multiply with; float32, contiguous."""

    scale: torch.Tensor  # [heads]
    table: torch.Tensor | None  # [heads, positions]
    pad: torch.Tensor | None  # [3, heads, D]
    cosine: bool


def terms(
    heads: int,
    dim: int,
    table: torch.Tensor | None,
    pad: torch.Tensor | None,
    logit_scale: torch.Tensor | None,
    scale: float | None = None,
) -> Terms:
    """The arguments of the op as the kernels want them; ready for several calls of `run`."""
    f32 = torch.float32
    return Terms(
        factors(logit_scale, heads, dim, scale, f32, torch.device("cpu")).contiguous(),
        None if table is None else table.to(f32).t().contiguous(),
        None if pad is None else pad.to(f32).contiguous(),
        logit_scale is not None,
    )


def _terms_of(call: Call) -> Terms:
    heads, dim = call.qkv.shape[-2:]
    return terms(heads, dim, call.table, call.pad, call.logit_scale, call.scale)


def run(
    qkv: torch.Tensor,
    out: torch.Tensor,
    size: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    terms: Terms,
    *,
    roll_first: bool = True,
    grid: bool = False,
    stats: torch.Tensor | None = None,
    stripe: tuple[int, int] | None = None,
) -> None:
    """The forward into `out`; checks nothing beyond what addresses need.

    Args:
        qkv: [B, H, W, 3, heads, D]; out: [B, H, W, heads, D], contiguous.
        size: H and W of the map.
        stripe: (first, last): only these rows of windows, of one image. Then qkv and out hold just
            their rows of the map, which has been rolled back by shift[0] already.
    """
    qkv = _unit_stride(qkv)
    problem = _problem(qkv, size, window, shift, terms, roll_first, grid, stripe)
    native().window_forward(problem, address(out), address(stats), threads())


def backward(call: BackwardCall) -> tuple[torch.Tensor, ...]:
    """Gradients of `INPUTS`, empty where not wanted (qkv's is computed always)."""
    stats, given = call.stats, call.forward
    if stats.flatten()[-1] < 0:  # the forward ran on another backend, which saves none
        _, stats = forward(given)
    qkv, grad = _unit_stride(call.qkv), call.grad.contiguous()
    problem = _problem(
        qkv, qkv.shape[1:3], given.window, given.shift, _terms_of(given), given.roll_first,
        given.grid,
    )  # fmt: skip
    dqkv = qkv.new_empty(qkv.shape)
    table, pad, logit_scale = (
        t if w else None
        for t, w in zip((call.table, call.pad, call.logit_scale), call.wanted[1:], strict=True)
    )
    f32 = torch.float32
    dtable = None if table is None else qkv.new_empty(table.t().shape, dtype=f32)
    dpad = None if pad is None else qkv.new_empty(pad.shape, dtype=f32)
    dscale = None if logit_scale is None else qkv.new_empty(logit_scale.shape, dtype=f32)
    native().window_backward(
        problem, address(stats), address(grad), address(dqkv), address(dtable), address(dpad),
        address(dscale), threads(),
    )  # fmt: skip
    if table is not None and dtable is not None:
        dtable = dtable.t().contiguous().to(table.dtype)
    if pad is not None and dpad is not None:
        dpad = dpad.to(pad.dtype)
    if logit_scale is not None and dscale is not None:  # of exp(min(x, largest))
        x = logit_scale.float()
        below = x <= LARGEST_SCALE
        dscale = (dscale * x.clamp(max=LARGEST_SCALE).exp() * below).to(logit_scale.dtype)
    found = (dqkv, dtable, dpad, dscale)
    return tuple(qkv.new_empty(0) if t is None else t for t in found)


def _unit_stride(qkv: torch.Tensor) -> torch.Tensor:
    return qkv if qkv.stride(-1) == 1 or qkv.shape[-1] == 1 else qkv.contiguous()


def _problem(
    qkv: torch.Tensor, size: tuple[int, ...], window: tuple[int, int], shift: tuple[int, int],
    terms: Terms, roll_first: bool, grid: bool, stripe: tuple[int, int] | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """`WindowProblem` of csrc/bindings/window.cpp."""
    sb, sy, sx, s3, sh, _ = qkv.stride()
    return (
        DTYPE_CODES[qkv.dtype], (qkv.shape[0], *size, *qkv.shape[-2:]), (*window, *shift),
        roll_first, grid, terms.cosine, address(qkv), (sb, sy, sx, s3, sh),
        address(terms.scale), address(terms.table), address(terms.pad), stripe,
    )  # fmt: skip


BACKEND = Backend("cpu", forward, can_run, backward, reasons)
