"""The public `window_attention`: meaning, checks, registration of `vitfast::window_attention`."""

from __future__ import annotations

import math
from typing import Any

import torch

from vitfast.errors import InputTypeError, InputValueError
from vitfast.ops.window_attention import native, unfused
from vitfast.ops.window_attention.reference import INPUTS, BackwardCall, Call
from vitfast.runtime import checks, triton
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import autocast_dtype, define, needs_grad, without_autocast
from vitfast.runtime.triton_backend import lazy


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


def _check(
    qkv: torch.Tensor, window: object, shift: object, table: torch.Tensor | None,
    pad: torch.Tensor | None, logit_scale: torch.Tensor | None, scale: float | None, grid: bool,
) -> tuple[tuple[int, int], tuple[int, int]]:  # fmt: skip
    """Raises for bad arguments; else window and shift as pairs."""
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


def _pair(op: str, name: str, value: object) -> tuple[int, int]:
    if not isinstance(value, (tuple, list, torch.Size)) or len(value) != 2:
        raise InputTypeError(f"{op}: {name} must be a pair of rows and columns, got {value!r}")
    if not all(isinstance(v, (int, torch.SymInt)) and not isinstance(v, bool) for v in value):
        raise InputTypeError(f"{op}: {name} must be a pair of integers, got {value!r}")
    rows, columns = value
    return rows, columns


def _triton_reasons(call: Call) -> list[str]:
    why = triton.reasons(call.qkv, call.table, call.pad, call.logit_scale, dots=True)
    sides = zip(call.shift, call.qkv.shape[1:3], strict=True)
    if call.roll_first and any(by > size for by, size in sides):
        why.append("the shift goes round the map more than once")
    if call.qkv.shape[-1] > 256:
        why.append(f"head dim {call.qkv.shape[-1]} is above 256")
    if call.wh * call.ww > 4096:
        why.append(f"a window of {call.wh} x {call.ww} tokens; the kernels take 4,096")
    return why


DISPATCHER = Dispatcher(
    "window_attention",
    [
        native.BACKEND,
        lazy("vitfast.ops.window_attention.triton", _triton_reasons),
        Backend("reference", unfused.forward, lambda call: [], unfused.backward),
    ],
)


def _forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *inputs, backend = args
    call = Call(*inputs)
    chosen = DISPATCHER.pick(backend, call, needs_backward=call.save_stats)
    if call.qkv.numel() == 0:
        out, stats = _fake(*args)
        return out.zero_(), stats.zero_()
    with without_autocast(call.qkv.device):
        return chosen.forward(call)


def _fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = Call(*args[:-1])
    qkv = call.qkv
    batch, high, wide, _, heads, dim = qkv.shape
    stats_dtype = torch.promote_types(qkv.dtype, torch.float32)
    return (
        qkv.new_empty(batch, high, wide, heads, dim),
        qkv.new_empty(call.stats_shape, dtype=stats_dtype),
    )


def _backward(*args: Any) -> tuple[torch.Tensor, ...]:
    *inputs, backend = args
    call = BackwardCall(*inputs)
    chosen = DISPATCHER.pick_backward(backend, call.forward)
    if call.qkv.numel() == 0:
        return tuple(g.zero_() for g in _backward_fake(*args))
    with without_autocast(call.qkv.device):
        return chosen(call)


def _backward_fake(*args: Any) -> tuple[torch.Tensor, ...]:
    call = BackwardCall(*args[:-1])
    return tuple(
        torch.empty_like(getattr(call, n), memory_format=torch.contiguous_format)
        if w
        else call.qkv.new_empty(0)
        for n, w in zip(INPUTS, call.wanted, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *arguments, ctx.backend = inputs
    call, stats = Call(*arguments), output[1]
    ctx.options = {n: v for n, v in call._asdict().items() if n not in (*INPUTS, "save_stats")}
    ctx.save_for_backward(stats, *(getattr(call, n) for n in INPUTS))
    ctx.mark_non_differentiable(stats)


def _autograd(ctx: Any, grad: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
    stats, *tensors = ctx.saved_tensors
    needed = dict(zip(Call._fields, ctx.needs_input_grad, strict=False))
    wanted = [needed[n] for n in INPUTS]
    inputs = dict(zip(INPUTS, tensors, strict=True))
    call = BackwardCall(grad=grad, stats=stats, wanted=wanted, **inputs, **ctx.options)
    found = zip(INPUTS, _BACKWARD_OP(*call, ctx.backend), wanted, strict=True)
    gradient = {n: g for n, g, w in found if w}
    return *(gradient.get(n) for n in Call._fields), None


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
