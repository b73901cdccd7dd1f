"""The public `patch_embed`: meaning and checks; registration of `vitfast::patch_embed`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vitfast.errors import InputValueError
from vitfast.ops.patch_embed import native, reference
from vitfast.ops.patch_embed.reference import INPUTS, Call
from vitfast.runtime import checks, triton
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import autocast_dtype, define
from vitfast.runtime.triton_backend import lazy

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
    call = Call(image, weight, bias, pos_embed, prefix, mean, std, lower, out_dtype)
    return _OP(*call, backend)


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


def _check_shapes(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pos_embed: torch.Tensor | None,
    prefix: torch.Tensor | None,
) -> None:
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


def _triton_reasons(call: Call) -> list[str]:
    why = triton.reasons(*(getattr(call, name) for name in INPUTS), dots=True)
    on_cpu = call.image.device.type == "cpu"
    if not why and on_cpu and torch.bfloat16 in (call.dtype, call.out_dtype):
        why.append("Triton's interpreter computes bfloat16 wrongly; use float16 or float32")
    return why


def backend_key(call: Call) -> dict[str, int | str]:
    """What it depends on whether Triton's kernel or the vendor's convolution is faster."""
    return {
        "image": str(call.image.dtype).removeprefix("torch."),
        "dtype": str(call.dtype).removeprefix("torch."),
        "pixels": call.image[:, 0].numel(),
        "n": call.weight.shape[0],
        "patch": call.weight.shape[-1],
    }


DISPATCHER = Dispatcher(
    "patch_embed",
    [
        native.BACKEND,
        lazy("vitfast.ops.patch_embed.triton", _triton_reasons, key=backend_key),
        Backend("reference", reference.compute, lambda call: [], reference.backward),
    ],
)


def _forward(*args: Any) -> torch.Tensor:
    *fields, backend = args
    call = Call(*fields)
    return DISPATCHER.pick(backend, call).forward(call)


def _fake(*args: Any) -> torch.Tensor:
    call = Call(*args[:-1])
    shape = (call.image.shape[0], call.tokens, call.weight.shape[0])
    return call.image.new_empty(shape, dtype=call.out_dtype)


def _backward(grad: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    *fields, wanted, backend = args
    call = Call(*fields)
    return DISPATCHER.pick_backward(backend, call)(grad, call, wanted)


def _backward_fake(grad: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    *fields, wanted, _ = args
    call = Call(*fields)
    tensors = (getattr(call, name) for name in INPUTS)
    return tuple(
        t.new_empty(t.shape) if w and t is not None else grad.new_empty(0)
        for t, w in zip(tensors, wanted, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *fields, ctx.backend = inputs
    call = Call(*fields)
    ctx.dtype, ctx.out_dtype = call.dtype, call.out_dtype
    ctx.save_for_backward(*(getattr(call, name) for name in (*INPUTS, "mean", "std")))


def _autograd(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *tensors, mean, std = ctx.saved_tensors
    given: dict[str, Any] = dict(zip(INPUTS, tensors, strict=True))
    call = Call(**given, mean=mean, std=std, dtype=ctx.dtype, out_dtype=ctx.out_dtype)
    wanted = [
        getattr(call, name) is not None and ctx.needs_input_grad[Call._fields.index(name)]
        for name in INPUTS
    ]
    found = _BACKWARD_OP(grad, *call, wanted, ctx.backend)
    by_name = {n: g for n, g, w in zip(INPUTS, found, wanted, strict=True) if w}
    return *(by_name.get(name) for name in Call._fields), None


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
