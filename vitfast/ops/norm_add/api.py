"""The public `norm_add`: meaning and checks; registration of `vitfast::norm_add`."""

from __future__ import annotations

import torch

from vitfast.ops.add_norm.reference import normalise
from vitfast.ops.common import norm as norm_op
from vitfast.ops.common.autodiff import gradients
from vitfast.ops.layer_norm import api as layer_norm_api
from vitfast.ops.norm_add import native, reference
from vitfast.ops.residual_add import api as residual_add_api
from vitfast.ops.residual_add.reference import drop_gradient, per_sample
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import define, needs_grad
from vitfast.runtime.triton import lazy


def norm_add(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    drop_scale: torch.Tensor | None = None,
    norm: str = "layer",
    backend: str = "auto",
) -> torch.Tensor:
    """x + drop_scale * (norm(branch) * weight + bias): the residual connection to a normed branch.

    Residual-post-norm (Liu et al. 2022; timm `SwinTransformerV2Block`); `add_norm` is its sibling
    that adds before it normalises. One pass over memory: x and branch are read, the sum written,
    X (x's size + branch's + the sum's) bytes for X elements. The backward keeps the branch and two
    numbers a row, reads branch and gradient and writes the branch's; x's is the gradient itself.

    Args:
        x: [..., C], float32, float16, bfloat16 or float64, any strides.
        branch: shape of x; may have another floating dtype.
        weight, bias: [C]; may have another floating dtype. "rms" takes no bias.
        eps: added to the variance ("layer") or the mean square ("rms").
        drop_scale: [B] floats, one per entry of x's first dimension: DropPath's factor (Huang et
            al. 2016), 0 for a dropped sample, 1 / keep for a kept one.
        norm: "layer" (as `layer_norm`) or "rms" (as `rms_norm`).
        backend: "auto", or a name ("cpu", "reference") that then must be able to run.

    Returns:
        [..., C], contiguous, in the dtype that torch's promotion gives `x + norm(branch)`: under
        autocast on a GPU that norm is float32, on a CPU of the branch's dtype.

    Raises:
        InputTypeError, InputValueError, UnsupportedInputError, DeviceError: bad arguments.
        BackendUnavailableError: the backend asked for cannot run.
    """
    residual_add_api.check("norm_add", x, branch, None, drop_scale)
    layer_norm_api.check("norm_add", branch, weight, bias, eps, None)
    norm_op.check_kind("norm_add", norm, bias)
    normed_dtype = layer_norm_api.autocast_out_dtype(branch) or branch.dtype
    dtype = torch.promote_types(x.dtype, normed_dtype)
    save_stats = needs_grad(x, branch, weight, bias, drop_scale)
    y, _ = _OP(x, branch, weight, bias, eps, drop_scale, norm, dtype, save_stats, backend)
    return y


def _reference_forward(x, branch, weight, bias, eps, drop_scale, norm, dtype, save_stats):
    y = reference.norm_add(
        x.to(dtype), branch, weight, bias, eps, drop_scale=drop_scale, norm=norm
    ).contiguous()  # fmt: skip
    if not save_stats:
        return y, norm_op.absent(x)
    return y, norm_op.reference_stats(norm_op.KINDS[norm], branch, eps)


def _reference_backward(grad, branch, weight, bias, eps, drop_scale, stats, norm):
    if drop_scale is not None:
        grad = grad * per_sample(drop_scale, grad)
    return gradients(
        lambda b, w, c: normalise(b, w, c, eps, norm, grad.dtype), (branch, weight, bias), (grad,)
    )


def _triton_reasons(x, branch, weight, bias, eps, drop_scale, norm, dtype, save_stats):
    return norm_op.triton_reasons(x, branch, weight, bias, out_dtype=dtype)


DISPATCHER = Dispatcher(
    "norm_add",
    [
        native.BACKEND,
        lazy("vitfast.ops.norm_add.triton", _triton_reasons),
        Backend("reference", _reference_forward, lambda *args: [], _reference_backward),
    ],
)


def _forward(x, branch, weight, bias, eps, drop_scale, norm, dtype, save_stats, backend):
    args = (x, branch, weight, bias, eps, drop_scale, norm, dtype, save_stats)
    return DISPATCHER.pick(backend, *args, needs_backward=save_stats).forward(*args)


def _fake(x, branch, weight, bias, eps, drop_scale, norm, dtype, save_stats, backend):
    return x.new_empty(x.shape, dtype=dtype), norm_op.fake_stats(branch, save_stats)


def _backward(grad, branch, weight, bias, eps, drop_scale, stats, norm, backend):
    picked = DISPATCHER.pick(
        backend, grad, branch, weight, bias, eps, drop_scale, norm, grad.dtype, True,
        needs_backward=True,
    )  # fmt: skip
    return picked.backward(grad, branch, weight, bias, eps, drop_scale, stats, norm)


def _backward_fake(grad, branch, weight, bias, eps, drop_scale, stats, norm, backend):
    return norm_op.backward_fake(branch, weight, bias)


def _setup_context(ctx, inputs, output):
    x, branch, weight, bias, ctx.eps, drop_scale, ctx.norm, _, _, ctx.backend = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(branch, weight, bias, drop_scale, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad, _):
    branch, weight, bias, drop_scale, stats = ctx.saved_tensors
    dbranch = dweight = dbias = ddrop = None
    if any(ctx.needs_input_grad[1:4]):
        dbranch, *vectors = _BACKWARD_OP(
            grad, branch, weight, bias, ctx.eps, drop_scale, stats, ctx.norm, ctx.backend
        )
        dweight, dbias = norm_op.present(*zip((weight, bias), vectors, strict=True))
    if ctx.needs_input_grad[5]:
        normed = normalise(branch, weight, bias, ctx.eps, ctx.norm, grad.dtype)
        ddrop = drop_gradient(grad, normed, None, drop_scale)
    return grad.to(ctx.x_dtype), dbranch, dweight, dbias, None, ddrop, None, None, None, None


_BACKWARD_OP = define(
    "norm_add_backward",
    "(Tensor grad, Tensor branch, Tensor? weight, Tensor? bias, float eps, Tensor? drop_scale,"
    " Tensor stats, str norm, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_OP = define(
    "norm_add",
    "(Tensor x, Tensor branch, Tensor? weight, Tensor? bias, float eps, Tensor? drop_scale,"
    " str norm, ScalarType dtype, bool save_stats, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_autograd,
)
