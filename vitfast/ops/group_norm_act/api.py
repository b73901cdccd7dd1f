"""The public `group_norm_act`: meaning and checks; registration of `vitfast::group_norm_act`."""

from __future__ import annotations

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common.autodiff import gradients
from vitfast.ops.group_norm_act import native, reference
from vitfast.ops.layer_norm.api import autocast_out_dtype
from vitfast.runtime import checks, triton
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import define, needs_grad


def group_norm_act(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    act: str = "none",
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """act(GroupNorm(x) + residual): a map read twice and written once.

    GroupNorm (Wu and He 2018; `torch.nn.GroupNorm`, timm `GroupNormAct`) and what comes after it
    in a bottleneck of timm's ResNetV2. The first read takes the statistics, and of a small map the
    second finds it in cache: memory's floor is x, the residual and the result once each. The
    backward reads gradient, x and, for the activation, the result twice each.

    Args:
        x: [B, C, H, W], float32, float16, bfloat16 or float64, any strides; contiguous and
            channels-last ones as they are.
        groups: a divisor of C.
        weight, bias: [C]; may have another floating dtype than x.
        eps: added to the variance. torch's default.
        residual: [B, C, H, W], added before the activation; may have another floating dtype.
        act: "none" or "relu".
        out_dtype: dtype of the result; by default that of x + residual.

    Returns:
        [B, C, H, W]; channels-last where x's channels are contiguous, else contiguous. Statistics
        are accumulated in float32 about a shift (float64 for float64).

    Raises:
        InputTypeError, InputValueError, UnsupportedInputError, DeviceError: bad arguments.
        BackendUnavailableError: the backend asked for cannot run.
    """
    op = "group_norm_act"
    checks.check_tensor(op, "x", x)
    if x.ndim != 4:
        raise checks.InputValueError(f"{op}: x must be [B, C, H, W], got shape {tuple(x.shape)}")
    if not isinstance(groups, int) or groups < 1 or x.shape[1] % groups:
        raise checks.InputValueError(
            f"{op}: groups must divide the {x.shape[1]} channels of x, got {groups!r}"
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            checks.check_tensor(op, name, t)
            checks.check_shape(op, name, t, (x.shape[1],))
    if residual is not None:
        checks.check_tensor(op, "residual", residual)
        checks.check_shape(op, "residual", residual, tuple(x.shape))
    checks.check_same_device(op, x=x, weight=weight, bias=bias, residual=residual)
    checks.check_eps(op, eps)
    if act not in reference.ACTS:
        raise checks.InputValueError(f"{op}: act must be 'none' or 'relu', got {act!r}")
    if out_dtype is not None and out_dtype not in checks.FLOATS:
        raise checks.InputTypeError(f"{op}: out_dtype must be a floating dtype, got {out_dtype}")
    out_dtype = out_dtype or autocast_out_dtype(x)
    save = needs_grad(x, weight, bias, residual)
    return _OP(x, groups, weight, bias, eps, residual, act, out_dtype, save, backend)[0]


def _reference_forward(x, groups, weight, bias, eps, residual, act, out_dtype, save_stats):
    y = reference.group_norm_act(
        x, groups, weight, bias, eps, residual=residual, act=act, out_dtype=out_dtype
    )
    return y, reference.stats(x, groups, eps) if save_stats else norm_op.absent(x)


def _reference_backward(grad, x, y, weight, bias, groups, eps, residual_dtype, stats):
    if y is not None:
        grad = torch.where(y <= 0, 0, grad)
    dx, dweight, dbias = gradients(
        lambda x, w, b: reference.group_norm_act(x, groups, w, b, eps, out_dtype=grad.dtype),
        (x, weight, bias),
        (grad,),
    )
    last = reference.channels_last(x)
    dresidual = norm_op.absent(x)
    if residual_dtype is not None:
        dresidual = reference.laid(grad.to(residual_dtype), last)
    return reference.laid(dx, last), dresidual, dweight, dbias


def _triton_reasons(x, groups, weight, bias, eps, residual, act, out_dtype, save_stats):
    out_dtype = out_dtype or native.result_dtype(x, residual)
    return norm_op.triton_reasons(x, weight, bias, residual, out_dtype=out_dtype, channels=1)


DISPATCHER = Dispatcher(
    "group_norm_act",
    [
        native.BACKEND,
        triton.lazy("vitfast.ops.group_norm_act.triton", _triton_reasons),
        Backend("reference", _reference_forward, lambda *args: [], _reference_backward),
    ],
)


def _forward(x, groups, weight, bias, eps, residual, act, out_dtype, save_stats, backend):
    args = (x, groups, weight, bias, eps, residual, act, out_dtype, save_stats)
    return DISPATCHER.pick(backend, *args, needs_backward=save_stats).forward(*args)


def _fake(x, groups, weight, bias, eps, residual, act, out_dtype, save_stats, backend):
    stats = norm_op.absent(x)
    if save_stats:
        wide = torch.promote_types(x.dtype, torch.float32)
        stats = x.new_empty((x.shape[0], groups, 2), dtype=wide)
    return _like(x, out_dtype or native.result_dtype(x, residual)), stats


def _like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    b, c, h, w = x.shape
    if reference.channels_last(x):
        return x.new_empty((b, h, w, c), dtype=dtype).permute(0, 3, 1, 2)
    return x.new_empty((b, c, h, w), dtype=dtype)


def _backward(grad, x, y, weight, bias, groups, eps, residual_dtype, stats, backend):
    residual = None if residual_dtype is None else grad.new_empty(0, dtype=residual_dtype)
    act = "none" if y is None else "relu"
    args = (x, groups, weight, bias, eps, residual, act, grad.dtype, True)
    return DISPATCHER.pick(backend, *args, needs_backward=True).backward(
        grad, x, y, weight, bias, groups, eps, residual_dtype, stats
    )


def _backward_fake(grad, x, y, weight, bias, groups, eps, residual_dtype, stats, backend):
    return (
        _like(x, x.dtype),
        norm_op.absent(x) if residual_dtype is None else _like(x, residual_dtype),
        *(norm_op.absent(x) if v is None else v.new_empty(v.shape) for v in (weight, bias)),
    )


def _setup_context(ctx, inputs, output):
    x, ctx.groups, weight, bias, ctx.eps, residual, act, _, _, ctx.backend = inputs
    ctx.residual_dtype = None
    if residual is not None and ctx.needs_input_grad[5]:
        ctx.residual_dtype = residual.dtype
    y, stats = output
    # ReLU's result tells where the gradient passes, and the convolution that follows keeps it too.
    ctx.save_for_backward(x, y if act == "relu" else None, weight, bias, stats)
    ctx.mark_non_differentiable(stats)


def _autograd(ctx, grad, _):
    x, y, weight, bias, stats = ctx.saved_tensors
    dresidual, in_kernel = None, None
    if y is None and ctx.residual_dtype is not None:
        dresidual = grad.to(ctx.residual_dtype)
    elif ctx.residual_dtype is not None:
        in_kernel = ctx.residual_dtype
    dx, found, dweight, dbias = _BACKWARD_OP(
        grad, x, y, weight, bias, ctx.groups, ctx.eps, in_kernel, stats, ctx.backend
    )
    if in_kernel is not None:
        dresidual = found
    dweight, dbias = norm_op.present((weight, dweight), (bias, dbias))
    return dx, None, dweight, dbias, None, dresidual, None, None, None, None


_BACKWARD_OP = define(
    "group_norm_act_backward",
    "(Tensor grad, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, int groups, float eps,"
    " ScalarType? residual_dtype, Tensor stats, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_OP = define(
    "group_norm_act",
    "(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, Tensor? residual, str act,"
    " ScalarType? out_dtype, bool save_stats, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_autograd,
)
