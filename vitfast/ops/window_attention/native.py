"""Windowed attention on the kernels of csrc/cpu/window_forward.cpp and window_backward.cpp."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vitfast.ops.window_attention.reference import LARGEST_SCALE, factors
from vitfast.runtime.dispatch import Backend
from vitfast.runtime.native import DTYPE_CODES, address, native, reasons, threads

MOST_TOKENS = 1 << 16
"""Of a window."""


def can_run(qkv, window, shift, table, pad, logit_scale, scale, roll_first, grid, save_stats):
    why = reasons()
    if qkv.device.type != "cpu":
        why.append(f"qkv is on {qkv.device}; the kernels run on the CPU")
    if qkv.dtype not in (torch.float32, torch.bfloat16):
        why.append(f"qkv has dtype {qkv.dtype}; the kernels take float32 and bfloat16")
    if qkv.shape[-1] > 256:
        why.append(f"head dim {qkv.shape[-1]} is above 256")
    if window[0] * window[1] > MOST_TOKENS:
        why.append(f"a window of {window[0]} x {window[1]} tokens; the kernels take {MOST_TOKENS}")
    return why


def forward(qkv, window, shift, table, pad, logit_scale, scale, roll_first, grid, save_stats):
    batch, high, wide, _, heads, dim = qkv.shape
    out = qkv.new_empty(batch, high, wide, heads, dim)
    stats = qkv.new_empty(stats_shape(qkv, window) if save_stats else 0, dtype=torch.float32)
    with_terms = terms(heads, dim, table, pad, logit_scale, scale)
    run(
        qkv, out, (high, wide), window, shift, with_terms, roll_first=roll_first, grid=grid,
        stats=stats,
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


def backward(
    grad, stats, qkv, window, shift, table, pad, logit_scale, scale, roll_first, grid, wanted
):  # fmt: skip
    if stats.flatten()[-1] < 0:  # the forward ran on another backend, which saves none
        _, stats = forward(
            qkv, window, shift, table, pad, logit_scale, scale, roll_first, grid, True
        )  # fmt: skip
    qkv, grad = _unit_stride(qkv), grad.contiguous()
    with_terms = terms(*qkv.shape[-2:], table, pad, logit_scale, scale)
    problem = _problem(qkv, qkv.shape[1:3], window, shift, with_terms, roll_first, grid)
    dqkv = qkv.new_empty(qkv.shape)
    sums = [
        qkv.new_empty((*t.shape[1:], *t.shape[:1]) if t is table else t.shape, dtype=torch.float32)
        if t is not None and w
        else None
        for t, w in zip((table, pad, logit_scale), wanted[1:], strict=True)
    ]
    native().window_backward(
        problem, address(stats), address(grad), address(dqkv),
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


def _unit_stride(qkv: torch.Tensor) -> torch.Tensor:
    return qkv if qkv.stride(-1) == 1 or qkv.shape[-1] == 1 else qkv.contiguous()


def _problem(qkv, size, window, shift, terms, roll_first, grid, stripe=None):
    """`WindowProblem` of csrc/bindings/window.cpp."""
    sb, sy, sx, s3, sh, _ = qkv.stride()
    return (
        DTYPE_CODES[qkv.dtype], (qkv.shape[0], *size, *qkv.shape[-2:]), (*window, *shift),
        roll_first, grid, terms.cosine, address(qkv), (sb, sy, sx, s3, sh),
        address(terms.scale), address(terms.table), address(terms.pad), stripe,
    )  # fmt: skip


def stats_shape(qkv: torch.Tensor, window: tuple[int, int]) -> tuple[int, ...]:
    batch, high, wide, _, heads, _ = qkv.shape
    windows = -(-high // window[0]) * -(-wide // window[1])
    return 2, batch, windows, heads, window[0] * window[1]


BACKEND = Backend("cpu", forward, can_run, backward, reasons)
