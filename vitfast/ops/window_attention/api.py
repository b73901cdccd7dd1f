"""The public `window_attention`: meaning, checks, registration of `vitfast::window_attention`."""

from __future__ import annotations

import math

import torch

from vitfast.errors import InputTypeError, InputValueError
from vitfast.ops.common.autodiff import gradients
from vitfast.ops.window_attention import native, reference
from vitfast.runtime import checks, triton
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import autocast_dtype, define, needs_grad, without_autocast

INPUTS = ("qkv", "table", "pad", "logit_scale")
"""Differentiable inputs, in the order of the outputs of `vitfast::window_attention_backward`."""


def window_attention(
    qkv: torch.Tensor,
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    table: torch.Tensor | None = None,
    pad: torch.Tensor | None = None,
    logit_scale: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    roll_first: bool = True,
    grid: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Multi-head attention within the windows of a feature map (Swin, Liu et al. 2021 and 2022).

    What timm's `SwinTransformerBlock._attn` does between the qkv layer and the projection, with the
    cyclic shift, the padding, the partition, the bias, the mask and the merge as index arithmetic.

    Args:
        qkv: [B, H, W, 3, heads, D], float32, float16, bfloat16 or float64, any strides.
        window: rows and columns of a window, at least 1 each. A map that has to be filled up to
            a window takes at most 65,536 tokens a window: what is allocated grows with them.
        shift: rows and columns that the map is rolled back by before it is cut into windows, each
            at least 0 and less than the window's. Tokens that only this brings together get -100
            added to their score; an axis with shift 0 has no such border.
        table: [(2 h - 1)(2 w - 1), heads], the bias by relative position (timm's
            `relative_position_bias_table`), added to the scores; any floating dtype.
        pad: [3, heads, D], the q, k and v of the tokens that fill the map up to whole windows (in
            timm the bias of the qkv layer: they are attended to); zeros by default.
        logit_scale: [heads]; with it attention is by cosine (V2): q and k have length 1, and the
            scores are multiplied by exp(min(logit_scale, log 100)).
        scale: factor of the scores without `logit_scale`; D**-0.5 by default.
        roll_first: shift, then pad (timm); else pad, then shift (Hugging Face).
        grid: the tokens of a window lie H / h rows and W / w columns apart, all over the map
            (MaxViT's grid attention, Tu et al. 2022); the window must divide the map, and there is
            no shift.
        backend: "auto", or a name that then must be able to run.

    Returns:
        [B, H, W, heads, D], contiguous, qkv's dtype (that of autocast where it is on).

    Raises:
        InputTypeError, InputValueError, UnsupportedInputError, DeviceError: bad arguments.
        BackendUnavailableError: the backend asked for cannot run.
        NotTwiceDifferentiableError: a gradient of a gradient was asked for.
    """
    window, shift = _check(qkv, window, shift, table, pad, logit_scale, scale, grid)
    lower = autocast_dtype(qkv.device)
    if lower is not None and qkv.dtype != torch.float64:
        qkv = qkv.to(lower)
    save = needs_grad(qkv, table, pad, logit_scale)
    return _OP(
        qkv, *window, *shift, table, pad, logit_scale, scale, roll_first, grid, save, backend
    )[0]  # fmt: skip


def _check(qkv, window, shift, table, pad, logit_scale, scale, grid):
    op = "window_attention"
    checks.check_tensor(op, "qkv", qkv)
    if qkv.ndim != 6 or qkv.shape[3] != 3 or 0 in qkv.shape[4:]:
        raise InputValueError(
            f"{op}: qkv must be [B, H, W, 3, heads, D] with heads and D, got {list(qkv.shape)}"
        )
    window = _pair(op, "window", window)
    shift = _pair(op, "shift", shift)
    if min(window) < 1:
        raise InputValueError(f"{op}: window must be at least 1 x 1, got {window}")
    tokens = window[0] * window[1]
    if tokens > native.MOST_TOKENS and any(
        size < w for size, w in zip(qkv.shape[1:3], window, strict=True)
    ):
        raise InputValueError(
            f"{op}: window {window} of {tokens} tokens on a map of {list(qkv.shape[1:3])}; where "
            f"the map has to be padded, a window takes at most {native.MOST_TOKENS}"
        )
    if not all(0 <= s < w for s, w in zip(shift, window, strict=True)):
        raise InputValueError(
            f"{op}: shift must be at least 0 and less than the window {window}, got {shift}"
        )
    if grid and any(shift):
        raise InputValueError(f"{op}: grid leaves nothing to shift, got shift {shift}")
    if grid and any(s % w for s, w in zip(qkv.shape[1:3], window, strict=True)):
        raise InputValueError(
            f"{op}: a grid of {window} must divide the map, got {list(qkv.shape[1:3])}"
        )
    heads, dim = qkv.shape[4:]
    shapes = {
        "table": (table, ((2 * window[0] - 1) * (2 * window[1] - 1), heads)),
        "pad": (pad, (3, heads, dim)),
        "logit_scale": (logit_scale, (heads,)),
    }
    for name, (t, shape) in shapes.items():
        if t is not None:
            checks.check_tensor(op, name, t)
            checks.check_shape(op, name, t, shape)
    checks.check_same_device(op, qkv=qkv, table=table, pad=pad, logit_scale=logit_scale)
    if scale is not None and not math.isfinite(scale):
        raise InputValueError(f"{op}: scale must be finite, got {scale}")
    if scale is not None and logit_scale is not None:
        raise InputValueError(f"{op}: scale has no meaning beside logit_scale")
    return window, shift


def _pair(op, name, value):
    if not isinstance(value, (tuple, list, torch.Size)) or len(value) != 2:
        raise InputTypeError(f"{op}: {name} must be a pair of rows and columns, got {value!r}")
    if not all(isinstance(v, (int, torch.SymInt)) and not isinstance(v, bool) for v in value):
        raise InputTypeError(f"{op}: {name} must be a pair of integers, got {value!r}")
    return tuple(value)


def _reference_forward(
    qkv, window, shift, table, pad, logit_scale, scale, roll_first, grid, save_stats
):  # fmt: skip
    out = reference.window_attention(
        qkv, window, shift, table, pad, logit_scale, scale=scale, roll_first=roll_first, grid=grid
    )
    return out, _no_stats(qkv, window, save_stats)


def _no_stats(qkv, window, save_stats):
    """Statistics of a forward that leaves none: sums of -1 tell a native backward so."""
    shape = native.stats_shape(qkv, window) if save_stats else (0,)
    return qkv.new_full(shape, -1.0, dtype=torch.promote_types(qkv.dtype, torch.float32))


def _reference_backward(
    grad, stats, qkv, window, shift, table, pad, logit_scale, scale, roll_first, grid, wanted
):  # fmt: skip
    def function(*leaves):
        args = iter(leaves)
        tensors = [
            next(args) if w else t
            for t, w in zip((qkv, table, pad, logit_scale), wanted, strict=True)
        ]
        first, *others = tensors
        return reference.window_attention(
            first, window, shift, *others, scale=scale, roll_first=roll_first, grid=grid
        )

    inputs = [t for t, w in zip((qkv, table, pad, logit_scale), wanted, strict=True) if w]
    found = iter(gradients(function, inputs, (grad,)))
    return tuple(next(found) if w else qkv.new_empty(0) for w in wanted)


def _triton_reasons(qkv, window, shift, table, pad, logit_scale, scale, roll_first, *_):
    why = triton.reasons(qkv, table, pad, logit_scale, dots=True)
    if roll_first and any(by > size for by, size in zip(shift, qkv.shape[1:3], strict=True)):
        why.append("the shift goes round the map more than once")
    if qkv.shape[-1] > 256:
        why.append(f"head dim {qkv.shape[-1]} is above 256")
    if window[0] * window[1] > 4096:
        why.append(f"a window of {window[0]} x {window[1]} tokens; the kernels take 4,096")
    return why


DISPATCHER = Dispatcher(
    "window_attention",
    [
        native.BACKEND,
        triton.lazy("vitfast.ops.window_attention.triton", _triton_reasons),
        Backend("reference", _reference_forward, lambda *args: [], _reference_backward),
    ],
)


def _forward(
    qkv, wh, ww, sh, sw, table, pad, logit_scale, scale, roll_first, grid, save_stats, backend
):  # fmt: skip
    args = (
        qkv, (wh, ww), (sh, sw), table, pad, logit_scale, scale, roll_first, grid, save_stats
    )  # fmt: skip
    chosen = DISPATCHER.pick(backend, *args, needs_backward=save_stats)
    if qkv.numel() == 0:
        out, stats = _fake(
            qkv, wh, ww, sh, sw, table, pad, logit_scale, scale, roll_first, grid, save_stats,
            backend,
        )  # fmt: skip
        return out.zero_(), stats.zero_()
    with without_autocast(qkv.device):
        return chosen.forward(*args)


def _fake(
    qkv, wh, ww, sh, sw, table, pad, logit_scale, scale, roll_first, grid, save_stats, backend
):  # fmt: skip
    batch, high, wide, _, heads, dim = qkv.shape
    shape = native.stats_shape(qkv, (wh, ww)) if save_stats else (0,)
    stats = qkv.new_empty(shape, dtype=torch.promote_types(qkv.dtype, torch.float32))
    return qkv.new_empty(batch, high, wide, heads, dim), stats


def _backward(
    grad, stats, qkv, wh, ww, sh, sw, table, pad, logit_scale, scale, roll_first, grid, wanted,
    backend,
):  # fmt: skip
    args = (qkv, (wh, ww), (sh, sw), table, pad, logit_scale, scale, roll_first, grid)
    chosen = DISPATCHER.pick(backend, *args, True, needs_backward=True)
    if qkv.numel() == 0:
        tensors = (qkv, table, pad, logit_scale)
        return tuple(
            torch.zeros_like(t, memory_format=torch.contiguous_format) if w else qkv.new_empty(0)
            for t, w in zip(tensors, wanted, strict=True)
        )
    with without_autocast(qkv.device):
        return chosen.backward(grad, stats, *args, wanted)


def _backward_fake(
    grad, stats, qkv, wh, ww, sh, sw, table, pad, logit_scale, scale, roll_first, grid, wanted,
    backend,
):  # fmt: skip
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if w else qkv.new_empty(0)
        for t, w in zip((qkv, table, pad, logit_scale), wanted, strict=True)
    )


def _setup_context(ctx, inputs, output):
    qkv, *ctx.window, table, pad, logit_scale = inputs[:8]
    ctx.scale, *ctx.layout, _, ctx.backend = inputs[8:]
    ctx.save_for_backward(output[1], qkv, table, pad, logit_scale)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad, _):
    stats, qkv, *others = ctx.saved_tensors
    needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[5:8])
    found = _BACKWARD_OP(
        grad, stats, qkv, *ctx.window, *others, ctx.scale, *ctx.layout, list(needed),
        ctx.backend,
    )  # fmt: skip
    dqkv, *dothers = (g if w else None for g, w in zip(found, needed, strict=True))
    return dqkv, *(None,) * 4, *dothers, *(None,) * 5


_BACKWARD_OP = define(
    "window_attention_backward",
    "(Tensor grad, Tensor stats, Tensor qkv, SymInt wh, SymInt ww, SymInt sh,"
    " SymInt sw, Tensor? table, Tensor? pad, Tensor? logit_scale, float? scale, bool roll_first,"
    " bool grid, bool[] wanted, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_OP = define(
    "window_attention",
    "(Tensor qkv, SymInt wh, SymInt ww, SymInt sh, SymInt sw, Tensor? table, Tensor? pad,"
    " Tensor? logit_scale, float? scale, bool roll_first, bool grid, bool save_stats,"
    " str backend)"
    " -> (Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_autograd,
)
