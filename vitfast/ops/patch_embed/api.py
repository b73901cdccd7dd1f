"""The public `patch_embed`: meaning and checks; registration of `vitfast::patch_embed`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vitfast.errors import InputValueError
from vitfast.ops.common.autodiff import gradients
from vitfast.ops.patch_embed import native, reference
from vitfast.runtime import checks, triton
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import autocast_dtype, define

PerChannel = torch.Tensor | Sequence[float] | None


def patch_embed(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    mean: PerChannel = None,
    std: PerChannel = None,
    pos_embed: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Image to tokens in one pass (Dosovitskiy et al. 2021; timm `PatchEmbed` and `_pos_embed`).

    Counted as a matrix product of B * N rows, Cin * P * P' columns and C outputs; no less is
    possible for a convolution whose stride is its kernel.

    Args:
        image: [B, Cin, H, W], floating or uint8, any strides (channels-last too). A uint8 image
            is divided by 255 first.
        weight: [C, Cin, P, P'], patches of any size that divides H x W. The image's dtype where
            that is floating, or any below float64 under autocast.
        bias: [C].
        mean, std: [Cin], sequences or tensors: (image - mean) / std, in float32 at least. Not
            differentiated.
        pos_embed: [1 or B, N, C], added to the patch tokens, or [1 or B, P0 + N, C], added to the
            prefix too; any floating dtype.
        prefix: [1 or B, P0, C], class and register tokens put in front; any floating dtype.
        out_dtype: dtype of the result; by default what torch's type promotion gives (under
            autocast a float32 pos_embed or prefix makes it float32, as in timm).
        backend: "auto", or a name that then must be able to run.

    Returns:
        [B, P0 + N, C], contiguous; N = H / P * W / P' patches, row by row.

    Raises:
        InputTypeError, InputValueError, UnsupportedInputError, DeviceError: bad arguments.
        BackendUnavailableError: the backend asked for cannot run.
        NotTwiceDifferentiableError: a gradient of a gradient was asked for.
    """
    op = "patch_embed"
    checks.check_tensor(op, "image", image, (*checks.FLOATS, torch.uint8))
    checks.check_tensor(op, "weight", weight)
    for name, t in (("bias", bias), ("pos_embed", pos_embed), ("prefix", prefix)):
        if t is not None:
            checks.check_tensor(op, name, t)
    mean, std = _per_channel("mean", mean, image), _per_channel("std", std, image)
    checks.check_same_device(
        op, image=image, weight=weight, bias=bias, pos_embed=pos_embed, prefix=prefix
    )
    _check_shapes(image, weight, bias, pos_embed, prefix)
    lower = autocast_dtype(image.device)
    if lower is None or torch.float64 in (image.dtype, weight.dtype):
        floating = image if image.dtype != torch.uint8 else None
        checks.check_same_dtype(op, weight=weight, bias=bias, image=floating)
        lower = weight.dtype
    if out_dtype is None:
        out_dtype = lower
        for t in (pos_embed, prefix):
            if t is not None:
                out_dtype = torch.promote_types(out_dtype, t.dtype)
    return _OP(image, weight, bias, pos_embed, prefix, mean, std, lower, out_dtype, backend)


def _per_channel(name: str, values: PerChannel, image: torch.Tensor) -> torch.Tensor | None:
    if values is None:
        return None
    wide = torch.promote_types(image.dtype, torch.float32)
    if not isinstance(values, torch.Tensor):
        values = torch.tensor(values, dtype=wide, device="cpu")
    checks.check_tensor("patch_embed", name, values)
    if image.ndim == 4:
        checks.check_shape("patch_embed", name, values, (image.shape[1],))
    return values.detach().to(device=image.device, dtype=wide)


def _check_shapes(image, weight, bias, pos_embed, prefix):
    for name, t, layout in (
        ("image", image, "[B, Cin, H, W]"),
        ("weight", weight, "[C, Cin, P, P']"),
    ):
        if t.ndim != 4:
            raise InputValueError(
                f"patch_embed: {name} has shape {tuple(t.shape)}, expected {layout}"
            )
    b, cin, height, width = image.shape
    c, weight_cin, p, q = weight.shape
    if cin != weight_cin:
        raise InputValueError(
            f"patch_embed: image has {cin} channels in shape {tuple(image.shape)}, "
            f"but weight takes {weight_cin} in shape {tuple(weight.shape)}"
        )
    if min(cin, p, q) == 0 or height % p or width % q:
        raise InputValueError(
            f"patch_embed: an image of {height} x {width} with {cin} channels cannot be cut into "
            f"patches of {p} x {q}"
        )
    checks.check_shape("patch_embed", "bias", bias, (c,))
    n = (height // p) * (width // q)
    p0 = 0
    if prefix is not None:
        p0 = prefix.shape[1] if prefix.ndim == 3 else -1
        if p0 < 0 or prefix.shape[0] not in (1, b) or prefix.shape[2] != c:
            raise InputValueError(
                f"patch_embed: prefix has shape {tuple(prefix.shape)}, expected [1 or {b}, P0, {c}]"
            )
    if pos_embed is not None and (
        pos_embed.ndim != 3
        or pos_embed.shape[0] not in (1, b)
        or pos_embed.shape[1] not in (n, n + p0)
        or pos_embed.shape[2] != c
    ):
        lengths = f"{n}" if p0 == 0 else f"{n} or {n + p0}"
        raise InputValueError(
            f"patch_embed: pos_embed has shape {tuple(pos_embed.shape)}, "
            f"expected [1 or {b}, {lengths}, {c}]"
        )


def token_count(image: torch.Tensor, weight: torch.Tensor, prefix: torch.Tensor | None) -> int:
    """P0 + N."""
    patches = (image.shape[2] // weight.shape[2]) * (image.shape[3] // weight.shape[3])
    return patches + (0 if prefix is None else prefix.shape[1])


def _reference_call(image, weight, bias, pos_embed, prefix, mean, std, dtype, out_dtype):
    return reference.patch_embed(
        image if image.dtype == torch.uint8 or mean is not None or std is not None
        else image.to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        mean=mean,
        std=std,
        pos_embed=pos_embed,
        prefix=prefix,
        out_dtype=out_dtype,
    )  # fmt: skip


def _reference_backward(
    grad, image, weight, bias, pos_embed, prefix, mean, std, dtype, out_dtype, wanted
):
    found = gradients(
        lambda *inputs: _reference_call(*inputs, mean, std, dtype, out_dtype),
        (image, weight, bias, pos_embed, prefix),
        (grad,),
    )
    return tuple(g if w else grad.new_empty(0) for g, w in zip(found, wanted, strict=True))


def _triton_reasons(image, weight, bias, pos_embed, prefix, mean, std, dtype, out_dtype):
    why = triton.reasons(image, weight, bias, pos_embed, prefix, dots=True)
    if not why and image.device.type == "cpu" and torch.bfloat16 in (dtype, out_dtype):
        why.append("Triton's interpreter computes bfloat16 wrongly; use float16 or float32")
    return why


def backend_key(image, weight, bias, pos_embed, prefix, mean, std, dtype, out_dtype):
    """What it depends on whether Triton's kernel or the vendor's convolution is faster."""
    return {
        "image": str(image.dtype).removeprefix("torch."),
        "dtype": str(dtype).removeprefix("torch."),
        "pixels": image[:, 0].numel(), "n": weight.shape[0], "patch": weight.shape[-1],
    }  # fmt: skip


DISPATCHER = Dispatcher(
    "patch_embed",
    [
        native.BACKEND,
        triton.lazy("vitfast.ops.patch_embed.triton", _triton_reasons, key=backend_key),
        Backend("reference", _reference_call, lambda *args: [], _reference_backward),
    ],
)


def _forward(image, weight, bias, pos_embed, prefix, mean, std, dtype, out_dtype, backend):
    args = (image, weight, bias, pos_embed, prefix, mean, std, dtype, out_dtype)
    return DISPATCHER.pick(backend, *args).forward(*args)


def _fake(image, weight, bias, pos_embed, prefix, mean, std, dtype, out_dtype, backend):
    shape = (image.shape[0], token_count(image, weight, prefix), weight.shape[0])
    return image.new_empty(shape, dtype=out_dtype)


def _backward(
    grad, image, weight, bias, pos_embed, prefix, mean, std, dtype, out_dtype, wanted, backend
):
    args = (image, weight, bias, pos_embed, prefix, mean, std, dtype, out_dtype)
    return DISPATCHER.pick(backend, *args, needs_backward=True).backward(grad, *args, wanted)


def _backward_fake(
    grad, image, weight, bias, pos_embed, prefix, mean, std, dtype, out_dtype, wanted, backend
):
    return tuple(
        t.new_empty(t.shape) if w and t is not None else grad.new_empty(0)
        for t, w in zip((image, weight, bias, pos_embed, prefix), wanted, strict=True)
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.dtype, ctx.out_dtype, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, grad):
    tensors = ctx.saved_tensors
    wanted = [
        t is not None and w for t, w in zip(tensors[:5], ctx.needs_input_grad[:5], strict=True)
    ]
    found = _BACKWARD_OP(grad, *tensors, ctx.dtype, ctx.out_dtype, wanted, ctx.backend)
    return *(g if w else None for g, w in zip(found, wanted, strict=True)), *(None,) * 5


_BACKWARD_OP = define(
    "patch_embed_backward",
    "(Tensor grad, Tensor image, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix,"
    " Tensor? mean, Tensor? std, ScalarType dtype, ScalarType out_dtype, bool[] wanted,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_OP = define(
    "patch_embed",
    "(Tensor image, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix, Tensor? mean,"
    " Tensor? std, ScalarType dtype, ScalarType out_dtype, str backend) -> Tensor",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_autograd,
)
