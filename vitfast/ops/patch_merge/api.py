"""The public `patch_merge`: meaning and checks; registration of `vitfast::patch_merge`."""

from __future__ import annotations

from typing import Any

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common import norm_checks
from vitfast.ops.common.autodiff import gradients, in_order
from vitfast.ops.patch_merge import native, reference
from vitfast.ops.patch_merge.reference import BackwardCall, Call
from vitfast.runtime import checks
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import define, needs_grad
from vitfast.runtime.triton_backend import lazy


def patch_merge(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    norm: str | None = "layer",
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """2x2 neighbours of a feature map side by side, and their norm, in one pass over memory.

    timm `PatchMerging` of Swin (Liu et al. 2021) up to its reduction; that of Swin V2 reduces
    before it normalises, which is this op with `norm=None`. Channels come in timm's order: top
    left, bottom left, top right, bottom right. Memory's floor: x is read and the result written
    once, B H W C (x's size + the result's) bytes where H and W are even; the backward reads x and
    the gradient and writes x's, without a norm but the latter two.

    Args:
        x: [B, H, W, C], float32, float16, bfloat16 or float64, any strides.
        weight, bias: [4 C]; may have another floating dtype. "rms" takes no bias, None neither.
        eps: added to the variance ("layer") or the mean square ("rms"). torch's default.
        norm: "layer" (as `layer_norm`), "rms" (as `rms_norm`), or None.
        out_dtype: dtype of the result; x's by default. Lets the operand of a low-precision matrix
            product be written directly.
        backend: "auto", or a name ("cpu", "reference") that then must be able to run.

    Returns:
        [B, ceil(H / 2), ceil(W / 2), 4 C], contiguous. Past the edges of odd sizes stand zeros,
        which count in the norm's statistics.

    Raises:
        InputTypeError, InputValueError, UnsupportedInputError, DeviceError: bad arguments.
        BackendUnavailableError: the backend asked for cannot run.
    """
    checks.check_tensor("patch_merge", "x", x)
    if x.ndim != 4:
        raise checks.InputValueError(
            f"patch_merge: x must be [B, H, W, C], got shape {tuple(x.shape)}"
        )
    norm_checks.check("patch_merge", x, weight, bias, eps, out_dtype, 4 * x.shape[3])
    if norm is None:
        if weight is not None or bias is not None:
            raise checks.InputValueError("patch_merge: norm=None takes no weight and no bias")
    else:
        norm_checks.check_kind("patch_merge", norm, bias, "'layer', 'rms' or None")
        out_dtype = out_dtype or norm_checks.autocast_out_dtype(x)
    y, _ = _OP(x, weight, bias, eps, norm, out_dtype, needs_grad(x, weight, bias), backend)
    return y


def _reference_forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    y = reference.patch_merge(
        call.x, call.weight, call.bias, call.eps, norm=call.norm, out_dtype=call.out_dtype
    ).contiguous()
    if not call.save_stats or call.norm is None:
        return y, norm_op.absent(y)
    rows = reference.patch_merge(call.x, norm=None)
    return y, norm_op.reference_stats(norm_op.KINDS[call.norm], rows, call.eps)


def _reference_backward(
    grad: torch.Tensor, call: Call, stats: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return gradients(
        lambda x, w, b: reference.patch_merge(
            x, w, b, call.eps, norm=call.norm, out_dtype=grad.dtype
        ),
        (call.x, call.weight, call.bias),
        (grad,),
    )


def _triton_reasons(call: Call) -> list[str]:
    return norm_op.triton_reasons(
        call.x, call.weight, call.bias, out_dtype=call.out_dtype, channels=4 * call.x.shape[3]
    )


DISPATCHER = Dispatcher(
    "patch_merge",
    [
        native.BACKEND,
        lazy("vitfast.ops.patch_merge.triton", _triton_reasons),
        Backend("reference", _reference_forward, lambda call: [], _reference_backward),
    ],
)


def _forward(*args: Any) -> tuple[torch.Tensor, ...]:
    call, backend = Call(*args[:-1]), args[-1]
    return DISPATCHER.pick(backend, call, needs_backward=call.save_stats).forward(call)


def _fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = Call(*args[:-1])
    rows = call.x.new_empty(norm_op.merged_shape(call.x))
    return norm_op.fake(rows, call.out_dtype, call.save_stats and call.norm is not None)


def _backward(*args: Any) -> tuple[torch.Tensor, ...]:
    given, backend = BackwardCall(*args[:-1]), args[-1]
    call = given.forward_call()
    return DISPATCHER.pick_backward(backend, call)(given.grad, call, given.stats)


def _backward_fake(*args: Any) -> tuple[torch.Tensor, ...]:
    call = BackwardCall(*args[:-1])
    like_x = call.grad.new_empty(call.shape, dtype=call.dtype)
    return norm_op.backward_fake(like_x, call.weight, call.bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    call, ctx.backend = Call(*inputs[:-1]), inputs[-1]
    ctx.eps, ctx.norm, ctx.shape, ctx.dtype = call.eps, call.norm, call.x.shape, call.x.dtype
    x = None if call.norm is None else call.x  # without a norm only its shape counts
    ctx.save_for_backward(x, call.weight, call.bias, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    x, weight, bias, stats = ctx.saved_tensors
    call = BackwardCall(grad, x, weight, bias, ctx.eps, stats, ctx.norm, ctx.shape, ctx.dtype)
    dx, *found = _BACKWARD_OP(*call, ctx.backend)
    dweight, dbias = norm_op.present(*zip((weight, bias), found, strict=True))
    return in_order(Call._fields, x=dx, weight=dweight, bias=dbias)


_BACKWARD_OP = define(
    "patch_merge_backward",
    "(Tensor grad, Tensor? x, Tensor? weight, Tensor? bias, float eps, Tensor stats, str? norm,"
    " SymInt[] shape, ScalarType dtype, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_OP = define(
    "patch_merge",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, str? norm, ScalarType? out_dtype,"
    " bool save_stats, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_autograd,
)
