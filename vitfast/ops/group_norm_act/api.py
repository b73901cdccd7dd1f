"""The public `group_norm_act`: meaning and checks; registration of `vitfast::group_norm_act`."""

from __future__ import annotations

from typing import Any

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common.autodiff import gradients
from vitfast.ops.group_norm_act import native, reference
from vitfast.ops.group_norm_act.reference import BackwardCall, Call
from vitfast.ops.layer_norm.api import autocast_out_dtype
from vitfast.runtime import checks
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import define, needs_grad
from vitfast.runtime.triton_backend import lazy


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


def _reference_forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    x = call.x
    y = reference.group_norm_act(
        x, call.groups, call.weight, call.bias, call.eps, residual=call.residual, act=call.act,
        out_dtype=call.out_dtype,
    )  # fmt: skip
    stats = reference.stats(x, call.groups, call.eps) if call.save_stats else norm_op.absent(x)
    return y, stats


def _reference_backward(call: BackwardCall) -> tuple[torch.Tensor, ...]:
    x, grad = call.x, call.grad
    if call.y is not None:
        grad = torch.where(call.y <= 0, 0, grad)

    def function(
        x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return reference.group_norm_act(
            x, call.groups, weight, bias, call.eps, out_dtype=grad.dtype
        )

    dx, dweight, dbias = gradients(function, (x, call.weight, call.bias), (grad,))
    last = reference.channels_last(x)
    dresidual = norm_op.absent(x)
    if call.residual_dtype is not None:
        dresidual = reference.laid(grad.to(call.residual_dtype), last)
    return reference.laid(dx, last), dresidual, dweight, dbias


def _triton_reasons(call: Call) -> list[str]:
    # Any number of channels: the kernels take them in blocks.
    return norm_op.triton_reasons(
        call.x, call.weight, call.bias, call.residual, out_dtype=call.result_dtype, channels=1
    )


DISPATCHER = Dispatcher(
    "group_norm_act",
    [
        native.BACKEND,
        lazy("vitfast.ops.group_norm_act.triton", _triton_reasons),
        Backend("reference", _reference_forward, lambda call: [], _reference_backward),
    ],
)


def _forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *inputs, backend = args
    call = Call(*inputs)
    return DISPATCHER.pick(backend, call, needs_backward=call.save_stats).forward(call)


def _fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = Call(*args[:-1])
    x = call.x
    stats = norm_op.absent(x)
    if call.save_stats:
        wide = torch.promote_types(x.dtype, torch.float32)
        stats = x.new_empty((x.shape[0], call.groups, 2), dtype=wide)
    return _like(x, call.result_dtype), stats


def _like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `native.empty`, of fake tensors too."""
    b, c, h, w = x.shape
    if reference.channels_last(x):
        return x.new_empty((b, h, w, c), dtype=dtype).permute(0, 3, 1, 2)
    return x.new_empty((b, c, h, w), dtype=dtype)


def _backward(*args: Any) -> tuple[torch.Tensor, ...]:
    *inputs, backend = args
    call = BackwardCall(*inputs)
    return DISPATCHER.pick_backward(backend, call.forward)(call)


def _backward_fake(*args: Any) -> tuple[torch.Tensor, ...]:
    call = BackwardCall(*args[:-1])
    x, dtype = call.x, call.residual_dtype
    dresidual = norm_op.absent(x) if dtype is None else _like(x, dtype)
    vectors = (call.weight, call.bias)
    dvectors = (norm_op.absent(x) if v is None else v.new_empty(v.shape) for v in vectors)
    return _like(x, x.dtype), dresidual, *dvectors


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *arguments, ctx.backend = inputs
    call = Call(*arguments)
    ctx.groups, ctx.eps, ctx.residual_dtype = call.groups, call.eps, None
    needed = dict(zip(Call._fields, ctx.needs_input_grad, strict=False))
    if call.residual is not None and needed["residual"]:
        ctx.residual_dtype = call.residual.dtype
    y, stats = output
    # ReLU's result tells where the gradient passes, and the convolution that follows keeps it too.
    y_kept = y if call.act == "relu" else None
    ctx.save_for_backward(call.x, y_kept, call.weight, call.bias, stats)
    ctx.mark_non_differentiable(stats)


def _autograd(ctx: Any, grad: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
    x, y, weight, bias, stats = ctx.saved_tensors
    dtype = ctx.residual_dtype
    # Without an activation the residual's gradient is the result's.
    in_kernel = None if y is None else dtype
    call = BackwardCall(grad, x, y, weight, bias, ctx.groups, ctx.eps, in_kernel, stats)
    dx, dresidual, dweight, dbias = _BACKWARD_OP(*call, ctx.backend)
    if in_kernel is None:
        dresidual = None if dtype is None else grad.to(dtype)
    dweight, dbias = norm_op.present((weight, dweight), (bias, dbias))
    found = {"x": dx, "residual": dresidual, "weight": dweight, "bias": dbias}
    return *(found.get(n) for n in Call._fields), None


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
