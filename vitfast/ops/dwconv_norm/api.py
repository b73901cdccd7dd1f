"""The public `dwconv_norm`: meaning and checks; registration of `vitfast::dwconv_norm`."""

from __future__ import annotations

import torch

from vitfast.errors import InputTypeError, InputValueError
from vitfast.ops.common import norm as norm_op
from vitfast.ops.common.autodiff import gradients
from vitfast.ops.dwconv_norm import native, reference
from vitfast.ops.layer_norm.api import autocast_out_dtype
from vitfast.runtime import checks
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import autocast_dtype, define, needs_grad, without_autocast
from vitfast.runtime.triton import lazy


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


def _check(x, weight, bias, norm_weight, norm_bias, eps, norm, out_dtype):
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


def _operands(dtype, x, weight, bias):
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _reference_forward(
    x, weight, bias, norm_weight, norm_bias, eps, norm, dtype, out_dtype, save_stats
):
    with without_autocast(x.device):
        x, weight, bias = _operands(dtype, x, weight, bias)
        y = reference.dwconv_norm(
            x, weight, bias, norm_weight, norm_bias, eps, norm=norm, out_dtype=out_dtype
        ).contiguous()
        if not save_stats:
            return y, norm_op.absent(x)
        rows = reference.convolve(x, weight, bias)
        return y, norm_op.reference_stats(norm_op.KINDS[norm], rows, eps)


def _reference_backward(
    grad, x, weight, bias, norm_weight, norm_bias, eps, norm, dtype, stats, wanted
):
    def function(x, weight, bias, *affine):
        return reference.dwconv_norm(
            *_operands(dtype, x, weight, bias), *affine, eps, norm=norm, out_dtype=grad.dtype
        )

    with without_autocast(x.device):
        found = gradients(function, (x, weight, bias, norm_weight, norm_bias), (grad,))
    return tuple(g if w else grad.new_empty(0) for g, w in zip(found, wanted, strict=True))


def _triton_reasons(
    x, weight, bias, norm_weight, norm_bias, eps, norm, dtype, out_dtype, save_stats
):
    tensors = (x, weight, bias, norm_weight, norm_bias)
    low = torch.bfloat16 in (dtype, out_dtype)
    return norm_op.triton_reasons(*tensors, out_dtype=torch.bfloat16 if low else out_dtype)


DISPATCHER = Dispatcher(
    "dwconv_norm",
    [
        native.BACKEND,
        lazy("vitfast.ops.dwconv_norm.triton", _triton_reasons),
        Backend("reference", _reference_forward, lambda *args: [], _reference_backward),
    ],
)


def _forward(*args):
    *args, backend = args
    return DISPATCHER.pick(backend, *args, needs_backward=args[-1]).forward(*args)


def _fake(
    x, weight, bias, norm_weight, norm_bias, eps, norm, dtype, out_dtype, save_stats, backend
):
    return norm_op.fake(x.new_empty(x.shape, dtype=dtype), out_dtype, save_stats)


def _backward(
    grad, x, weight, bias, norm_weight, norm_bias, eps, norm, dtype, stats, wanted, backend
):
    args = (x, weight, bias, norm_weight, norm_bias, eps, norm, dtype)
    picked = DISPATCHER.pick(backend, *args, grad.dtype, True, needs_backward=True)
    return picked.backward(grad, *args, stats, wanted)


def _backward_fake(
    grad, x, weight, bias, norm_weight, norm_bias, eps, norm, dtype, stats, wanted, backend
):
    return tuple(
        t.new_empty(t.shape) if w and t is not None else grad.new_empty(0)
        for t, w in zip((x, weight, bias, norm_weight, norm_bias), wanted, strict=True)
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, ctx.norm, ctx.dtype, _, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad, _):
    *tensors, stats = ctx.saved_tensors
    wanted = [t is not None and w for t, w in zip(tensors, ctx.needs_input_grad[:5], strict=True)]
    found = _BACKWARD_OP(grad, *tensors, ctx.eps, ctx.norm, ctx.dtype, stats, wanted, ctx.backend)
    return *(g if w else None for g, w in zip(found, wanted, strict=True)), *(None,) * 6


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
