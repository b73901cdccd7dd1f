"""Image to tokens in plain PyTorch: the definition."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from vitfast.ops.common.autodiff import gradients


class Call(NamedTuple):
    """The arguments of `vitfast::patch_embed` before `backend`, in the order of its schema.

    Args:
        image, weight, bias, pos_embed, prefix: as in `vitfast.ops.patch_embed`.
        mean, std: [Cin], float32 (float64 for such images), on the image's device; or None.
        dtype: that of the product's operands, which weight, bias and image are rounded to.
        out_dtype: that of the result.
    """

    image: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    pos_embed: torch.Tensor | None
    prefix: torch.Tensor | None
    mean: torch.Tensor | None
    std: torch.Tensor | None
    dtype: torch.dtype
    out_dtype: torch.dtype

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in an image."""
        (height, width), (p, q) = self.image.shape[2:], self.weight.shape[2:]
        return height // p, width // q

    @property
    def prefix_tokens(self) -> int:
        """P0, the number of tokens before the patches."""
        return 0 if self.prefix is None else self.prefix.shape[1]

    @property
    def tokens(self) -> int:
        """P0 + N, the number of tokens of an image."""
        rows, columns = self.grid
        return self.prefix_tokens + rows * columns


INPUTS = ("image", "weight", "bias", "pos_embed", "prefix")
"""Differentiable inputs, in the order of the outputs of `vitfast::patch_embed_backward`."""


def patch_embed(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
    pos_embed: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A convolution whose stride is its kernel, as tokens, with embeddings and prefix tokens.

    The image is scaled in float32 (at least), then rounded to the weight's dtype.
    """
    image = normalise(image, mean, std, weight.dtype)
    tokens = F.conv2d(image, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    if prefix is not None:
        prefix = prefix.expand(tokens.shape[0], -1, -1)
        # A position embedding as long as all tokens covers the prefix; a shorter one does not.
        if pos_embed is not None and pos_embed.shape[1] == tokens.shape[1]:
            tokens, pos_embed = tokens + pos_embed, None
        tokens = torch.cat((prefix, tokens), dim=1)
    if pos_embed is not None:
        tokens = tokens + pos_embed
    return tokens.to(out_dtype or tokens.dtype).contiguous()


def compute(call: Call) -> torch.Tensor:
    """Tokens [B, P0 + N, C] of a call, by differentiable torch ops."""
    dtype = call.dtype
    return patch_embed(
        call.image,
        call.weight.to(dtype),
        None if call.bias is None else call.bias.to(dtype),
        mean=call.mean,
        std=call.std,
        pos_embed=call.pos_embed,
        prefix=call.prefix,
        out_dtype=call.out_dtype,
    )


def backward(grad: torch.Tensor, call: Call, wanted: list[bool]) -> tuple[torch.Tensor, ...]:
    """Gradients for `INPUTS`, empty where not wanted: the convolution does not run again.

    Args:
        grad: [B, P0 + N, C], the gradient of the tokens.
        wanted: for each of `INPUTS`; False where it is None.
    """
    wants = dict(zip(INPUTS, wanted, strict=True))
    prefix, pos_embed = call.prefix, call.pos_embed
    found = {}
    if prefix is not None and wants["prefix"]:
        found["prefix"] = _summed(grad[:, : call.prefix_tokens], prefix)
    if pos_embed is not None and wants["pos_embed"]:
        found["pos_embed"] = _summed(grad[:, call.tokens - pos_embed.shape[1] :], pos_embed)
    mask = [wants[n] for n in ("image", "weight", "bias")]
    if any(mask):
        patches = grad[:, call.prefix_tokens :].to(call.dtype).mT.unflatten(2, call.grid)
        weight = call.weight.to(call.dtype)
        image = normalise(call.image, call.mean, call.std, call.dtype)
        of_image, of_weight, of_bias = torch.ops.aten.convolution_backward(
            patches, image, weight, [weight.shape[0]], weight.shape[2:], [0, 0], [1, 1], False,
            [0, 0], 1, mask,
        )  # fmt: skip
        if wants["image"]:
            (found["image"],) = gradients(
                lambda t: normalise(t, call.mean, call.std, call.dtype), (call.image,), (of_image,)
            )
        if wants["weight"]:
            found["weight"] = of_weight.to(call.weight.dtype).contiguous()
        if call.bias is not None and wants["bias"]:
            found["bias"] = of_bias.to(call.bias.dtype)
    return tuple(found[n] if n in found else grad.new_empty(0) for n in INPUTS)


def _summed(grad: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The gradient of t [1 or B, tokens, C], from that of what it was added to in every image."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = grad.sum(0, keepdim=True, dtype=wide) if t.shape[0] < grad.shape[0] else grad
    return total.to(t.dtype, copy=total is grad, memory_format=torch.contiguous_format)


def normalise(
    image: torch.Tensor,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(image - mean) / std per channel, of uint8 images divided by 255, rounded to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    if image.dtype == torch.uint8:
        image = image.to(wide) / 255
    if mean is not None:
        image = image.to(wide) - mean.to(wide).view(1, -1, 1, 1)
    if std is not None:
        image = image.to(wide) / std.to(wide).view(1, -1, 1, 1)
    return image.to(dtype)
