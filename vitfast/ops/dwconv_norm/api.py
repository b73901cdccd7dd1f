"""The public `dwconv_norm`: meaning and checks; registration of `vitfast::dwconv_norm`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from vitfast.errors import InputTypeError, InputValueError
from vitfast.ops.add_norm.reference import normalise
from vitfast.ops.common import norm as norm_op
from vitfast.ops.common.autodiff import gradients
from vitfast.ops.dwconv_norm import cuda, native, reference
from vitfast.ops.dwconv_norm.reference import INPUTS, BackwardCall, Call
from vitfast.ops.layer_norm.api import autocast_out_dtype
from vitfast.runtime import checks
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import autocast_dtype, define, needs_grad, without_autocast
from vitfast.runtime.triton_backend import lazy


def dwconv_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    norm: str | None = "layer",
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Depthwise convolution and a norm over channels, in one pass over memory.

    timm `ConvNeXtBlock` up to its MLP (Liu et al. 2022): stride 1, zero padding to the same size,
    then LayerNorm or RmsNorm. Floors: 2 k k' flops an element, and x read and the result written
    once. Sums are float32 (float64 for float64), and the convolution's result is not rounded before
    the norm. The backward keeps x, the parameters and two numbers a row, and convolves again.

    Args:
        x: [B, H, W, C], float32, float16, bfloat16 or float64, any strides (channels-last
            maps are contiguous here).
        weight: [C, 1, k, k'], k and k' odd. x's dtype, or any below float64 under autocast, where
            x, weight and bias are rounded to the autocast dtype, as by torch's convolution.
        bias: [C], of the weight's dtype.
        norm_weight, norm_bias: [C]; may have another floating dtype than x. "rms" takes no
            norm_bias, None neither.
        eps: added to the variance ("layer") or the mean square ("rms").
        norm: "layer" (as `layer_norm`), "rms" (as `rms_norm`), or None.
        out_dtype: dtype of the result; the convolution's by default (under autocast that of
            torch's norm after it). Lets the operand of a matrix product be written directly.
        backend: "auto", or a name ("cpu", "reference") that then must be able to run.

    Returns:
        [B, H, W, C], contiguous.

    Raises:
        InputTypeError, InputValueError, UnsupportedInputError, DeviceError: bad arguments.
        BackendUnavailableError: the backend asked for cannot run.
        NotTwiceDifferentiableError: a gradient of a gradient was asked for.
    """
    _check(x, weight, bias, norm_weight, norm_bias, eps, norm, out_dtype)
    dtype = autocast_dtype(x.device)
    if dtype is None or torch.float64 in (x.dtype, weight.dtype):
        checks.check_same_dtype("dwconv_norm", x=x, weight=weight, bias=bias)
        dtype = x.dtype
    if out_dtype is None:
        out_dtype = (None if norm is None else autocast_out_dtype(x)) or dtype
    save = norm is not None and needs_grad(x, weight, bias, norm_weight, norm_bias)
    tensors = (x, weight, bias, norm_weight, norm_bias)
    y, _ = _OP(*tensors, eps, norm, dtype, out_dtype, save, backend)
    return y


def _check(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None, norm_bias: torch.Tensor | None, eps: float, norm: str | None,
    out_dtype: torch.dtype | None,
) -> None:  # fmt: skip
    op = "dwconv_norm"
    vectors = {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, t in {"x": x, "weight": weight, **vectors}.items():
        if t is not None or name in ("x", "weight"):
            checks.check_tensor(op, name, t)
    if x.ndim != 4:
        raise InputValueError(f"{op}: x must be [B, H, W, C], got shape {tuple(x.shape)}")
    c = x.shape[3]
    odd = weight.ndim == 4 and all(size % 2 == 1 for size in weight.shape[2:])
    if not odd or tuple(weight.shape[:2]) != (c, 1):
        raise InputValueError(
            f"{op}: weight has shape {tuple(weight.shape)}, expected [{c}, 1, k, k'] with odd k"
            f" and k' for x of shape {tuple(x.shape)}"
        )
    for name, t in vectors.items():
        checks.check_shape(op, name, t, (c,))
    checks.check_same_device(op, x=x, weight=weight, **vectors)
    checks.check_eps(op, eps)
    if out_dtype is not None and out_dtype not in checks.FLOATS:
        raise InputTypeError(f"{op}: out_dtype must be a floating dtype, got {out_dtype}")
    if norm is None:
        if norm_weight is not None or norm_bias is not None:
            raise InputValueError(f"{op}: norm=None takes no norm_weight and no norm_bias")
    elif norm not in norm_op.KINDS:
        raise InputValueError(f"{op}: norm must be 'layer', 'rms' or None, got {norm!r}")
    elif norm == "rms" and norm_bias is not None:
        raise InputValueError(f"{op}: norm='rms' takes no norm_bias")


def _operands(
    dtype: torch.dtype, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _reference_forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    with without_autocast(call.x.device):
        rows = reference.convolve(*_operands(call.dtype, call.x, call.weight, call.bias))
        if call.norm is None:
            return rows.to(call.out_dtype).contiguous(), norm_op.absent(call.x)
        y = _normalised(call, rows, call.norm_weight, call.norm_bias).contiguous()
        if not call.save_stats:
            return y, norm_op.absent(call.x)
        return y, norm_op.reference_stats(norm_op.KINDS[call.norm], rows, call.eps)


def _normalised(
    call: Call, rows: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    assert call.norm is not None  # nobody else asks
    return normalise(rows, weight, bias, call.eps, call.norm, call.out_dtype)


def _reference_backward(call: BackwardCall) -> tuple[torch.Tensor, ...]:
    """One convolution for each gradient, and the forward's again where a norm lies behind it.

    Only what is normalised is kept of a forward: x and two numbers a row.
    """
    grad, found = call.grad, {}
    with without_autocast(call.x.device):
        x, weight, bias = _operands(call.dtype, call.x, call.weight, call.bias)
        drows = grad.to(torch.promote_types(x.dtype, torch.float32))
        if call.norm is not None:
            rows = reference.convolve(x, weight, bias)
            drows, found["norm_weight"], found["norm_bias"] = gradients(
                partial(_normalised, call.forward),
                (rows, call.norm_weight, call.norm_bias),
                (grad,),
            )
        found |= reference.convolve_backward(drows, x, weight, bias, call.wanted[:3])
    empty = grad.new_empty(0)
    return tuple(
        found[name].to(t.dtype) if wanted and t is not None else empty
        for name, t, wanted in zip(INPUTS, call.inputs, call.wanted, strict=True)
    )


def _triton_reasons(call: Call) -> list[str]:
    tensors = (call.x, call.weight, call.bias, call.norm_weight, call.norm_bias)
    low = torch.bfloat16 in (call.dtype, call.out_dtype)
    return norm_op.triton_reasons(*tensors, out_dtype=torch.bfloat16 if low else call.out_dtype)


DISPATCHER = Dispatcher(
    "dwconv_norm",
    [
        native.BACKEND,
        lazy("vitfast.ops.dwconv_norm.triton", _triton_reasons),
        cuda.BACKEND,
        Backend("reference", _reference_forward, lambda call: [], _reference_backward),
    ],
)


def _forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *inputs, backend = args
    call = Call(*inputs)
    return DISPATCHER.pick(backend, call, needs_backward=call.save_stats).forward(call)


def _fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = Call(*args[:-1])
    like = call.x.new_empty(call.x.shape, dtype=call.dtype)
    return norm_op.fake(like, call.out_dtype, call.save_stats)


def _backward(*args: Any) -> tuple[torch.Tensor, ...]:
    *inputs, backend = args
    call = BackwardCall(*inputs)
    return DISPATCHER.pick_backward(backend, call.forward)(call)


def _backward_fake(*args: Any) -> tuple[torch.Tensor, ...]:
    call = BackwardCall(*args[:-1])
    return tuple(
        t.new_empty(t.shape) if w and t is not None else call.grad.new_empty(0)
        for t, w in zip(call.inputs, call.wanted, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *arguments, ctx.backend = inputs
    call, stats = Call(*arguments), output[1]
    ctx.eps, ctx.norm, ctx.dtype = call.eps, call.norm, call.dtype
    ctx.save_for_backward(*(getattr(call, n) for n in INPUTS), stats)
    ctx.mark_non_differentiable(stats)


def _autograd(ctx: Any, grad: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
    *tensors, stats = ctx.saved_tensors
    needed = dict(zip(Call._fields, ctx.needs_input_grad, strict=False))
    inputs = dict(zip(INPUTS, tensors, strict=True))
    wanted = [t is not None and needed[n] for n, t in inputs.items()]
    call = BackwardCall(
        grad=grad, stats=stats, wanted=wanted, **inputs, eps=ctx.eps, norm=ctx.norm,
        dtype=ctx.dtype,
    )  # fmt: skip
    found = zip(INPUTS, _BACKWARD_OP(*call, ctx.backend), wanted, strict=True)
    gradient = {n: g for n, g, w in found if w}
    return *(gradient.get(n) for n in Call._fields), None


_BACKWARD_OP = define(
    "dwconv_norm_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias,"
    " float eps, str? norm, ScalarType dtype, Tensor stats, bool[] wanted, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_OP = define(
    "dwconv_norm",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float eps,"
    " str? norm, ScalarType dtype, ScalarType out_dtype, bool save_stats, str backend)"
    " -> (Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_autograd,
)
