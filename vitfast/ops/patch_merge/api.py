"""The public `patch_merge`: meaning and checks; registration of `vitfast::patch_merge`."""

from __future__ import annotations

import torch

from vitfast.ops.common import norm as norm_op
from vitfast.ops.common.autodiff import gradients
from vitfast.ops.layer_norm import api as layer_norm_api
from vitfast.ops.patch_merge import native, reference
from vitfast.runtime import checks
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import define, needs_grad
from vitfast.runtime.triton import lazy


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
    layer_norm_api.check("patch_merge", x, weight, bias, eps, out_dtype, 4 * x.shape[3])
    if norm is None:
        if weight is not None or bias is not None:
            raise checks.InputValueError("patch_merge: norm=None takes no weight and no bias")
    else:
        norm_op.check_kind("patch_merge", norm, bias, "'layer', 'rms' or None")
        out_dtype = out_dtype or layer_norm_api.autocast_out_dtype(x)
    y, _ = _OP(x, weight, bias, eps, norm, out_dtype, needs_grad(x, weight, bias), backend)
    return y


def _reference_forward(x, weight, bias, eps, norm, out_dtype, save_stats):
    y = reference.patch_merge(x, weight, bias, eps, norm=norm, out_dtype=out_dtype).contiguous()
    if not save_stats or norm is None:
        return y, norm_op.absent(x)
    return y, norm_op.reference_stats(norm_op.KINDS[norm], reference.patch_merge(x, norm=None), eps)


def _reference_backward(grad, x, weight, bias, eps, stats, norm):
    return gradients(
        lambda x, w, b: reference.patch_merge(x, w, b, eps, norm=norm, out_dtype=grad.dtype),
        (x, weight, bias),
        (grad,),
    )


def _triton_reasons(x, weight, bias, eps, norm, out_dtype, save_stats):
    return norm_op.triton_reasons(x, weight, bias, out_dtype=out_dtype, channels=4 * x.shape[3])


DISPATCHER = Dispatcher(
    "patch_merge",
    [
        native.BACKEND,
        lazy("vitfast.ops.patch_merge.triton", _triton_reasons),
        Backend("reference", _reference_forward, lambda *args: [], _reference_backward),
    ],
)


def _forward(x, weight, bias, eps, norm, out_dtype, save_stats, backend):
    args = (x, weight, bias, eps, norm, out_dtype, save_stats)
    return DISPATCHER.pick(backend, *args, needs_backward=save_stats).forward(*args)


def _fake(x, weight, bias, eps, norm, out_dtype, save_stats, backend):
    rows = x.new_empty(norm_op.merged_shape(x))
    return norm_op.fake(rows, out_dtype, save_stats and norm is not None)


def _backward(grad, x, weight, bias, eps, stats, norm, shape, dtype, backend):
    if x is None:  # without a norm only its shape counts
        x = grad.new_empty((), dtype=dtype).expand(shape)
    picked = DISPATCHER.pick(
        backend, x, weight, bias, eps, norm, grad.dtype, True, needs_backward=True
    )
    return picked.backward(grad, x, weight, bias, eps, stats, norm)


def _backward_fake(grad, x, weight, bias, eps, stats, norm, shape, dtype, backend):
    return norm_op.backward_fake(grad.new_empty(shape, dtype=dtype), weight, bias)


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.eps, ctx.norm, _, _, ctx.backend = inputs
    ctx.shape, ctx.dtype = x.shape, x.dtype
    ctx.save_for_backward(None if ctx.norm is None else x, weight, bias, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad, _):
    x, weight, bias, stats = ctx.saved_tensors
    dx, dweight, dbias = _BACKWARD_OP(
        grad, x, weight, bias, ctx.eps, stats, ctx.norm, ctx.shape, ctx.dtype, ctx.backend
    )
    return dx, *norm_op.present((weight, dweight), (bias, dbias)), None, None, None, None, None


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
