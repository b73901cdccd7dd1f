"""patch_embed on the kernels of csrc/cpu/patchify.cpp and csrc/cpu/gemm.cpp.

Patches are gathered a stretch at a time, so that they stay in the cache until they are multiplied
and the whole patch matrix never exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from vitfast.ops.common import gemm
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend
from vitfast.runtime.native import DTYPE_CODES

_STRETCH_BYTES, _LEAST_ROWS = 2 << 20, 64
_MOST_SUMMED = 2048
"""Rows of patches packed at a time for the weight's gradient."""


def can_run(image, weight, bias, pos_embed, prefix, mean, std, dtype, out_dtype):
    why = gemm.reasons(weight, bias, pos_embed, prefix)
    if image.dtype not in (*gemm.DTYPES, torch.uint8):
        why.append(f"images of {image.dtype} are not implemented, float32, bfloat16, uint8 are")
    for t in {dtype, out_dtype} - set(gemm.DTYPES):
        why.append(f"{t} is not implemented, float32 and bfloat16 are")
    return why


class Patches:
    """The rows of patches of a batch of images, gathered on demand."""

    def __init__(self, image, weight, mean, std, dtype):
        self.image, self.dtype = image, dtype
        channels, p, q = weight.shape[1:]
        grid = image.shape[2] // p, image.shape[3] // q
        self.sizes = channels, *grid, p, q
        self.per_image = grid[0] * grid[1]
        self.rows = image.shape[0] * self.per_image
        self.width = channels * p * q
        self.scale, self.shift = _affine(image.dtype, channels, mean, std)

    def gather(self, first: int, count: int, out: torch.Tensor) -> torch.Tensor:
        """Rows [first, first + count), written to the beginning of `out`."""
        native.native().patchify(
            native.address(self.image),
            DTYPE_CODES[self.image.dtype],
            self.image.stride(),
            self.sizes,
            native.address(self.scale),
            native.address(self.shift),
            first,
            count,
            native.address(out),
            DTYPE_CODES[self.dtype],
            native.threads(),
        )
        return out[:count]

    def gathered(self) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Stretches and their rows, which the next one overwrites."""
        scratch = None
        for images, part in self.stretches():
            count = (images.stop - images.start) * (part.stop - part.start)
            if scratch is None or len(scratch) < count:
                scratch = torch.empty(
                    (count, self.width), dtype=self.dtype, device=self.image.device
                )
            first = images.start * self.per_image + part.start
            yield images, part, self.gather(first, count, scratch)

    def stretches(self) -> Iterator[tuple[slice, slice]]:
        """(images, patches of each): part of one image, or several whole ones."""
        rows = max(_STRETCH_BYTES // (self.width * self.dtype.itemsize), _LEAST_ROWS)
        images, n = self.image.shape[0], self.per_image
        if n >= rows:
            parts = -(-n // rows)
            for b in range(images):
                for i in range(parts):
                    yield slice(b, b + 1), slice(n * i // parts, n * (i + 1) // parts)
        else:
            for b in range(0, images, rows // n):
                yield slice(b, min(b + rows // n, images)), slice(0, n)


def _affine(dtype, channels, mean, std):
    """Factor and summand per channel that scale an image; None where it stays as it is."""
    if mean is None and std is None and dtype != torch.uint8:
        return None, None
    factor = torch.full(
        (channels,), 1 / 255 if dtype == torch.uint8 else 1.0, dtype=torch.float64, device="cpu"
    )
    factor = factor if std is None else factor / std
    shift = torch.zeros_like(factor) if mean is None else -mean.double()
    shift = shift if std is None else shift / std
    return factor.float(), shift.float()


def forward(image, weight, bias, pos_embed, prefix, mean, std, dtype, out_dtype):
    patches = Patches(image, weight, mean, std, dtype)
    n, p0 = patches.per_image, 0 if prefix is None else prefix.shape[1]
    out = native.empty((image.shape[0], p0 + n, weight.shape[0]), out_dtype)
    if not out.numel():
        return out
    covers = pos_embed is not None and pos_embed.shape[1] == p0 + n
    if p0:
        out[:, :p0] = prefix + pos_embed[:, :p0] if covers else prefix
    if covers:
        pos_embed = pos_embed[:, p0:]
    if not n:
        return out
    b = gemm.matrix((weight,), dtype, patches.rows)
    for images, part, rows in patches.gathered():
        view = out[images, p0 + part.start : p0 + part.stop]
        pos = None
        if pos_embed is not None:
            pos = pos_embed[images] if pos_embed.shape[0] > 1 else pos_embed
            pos = pos[:, part].expand(view.shape)
        gemm.product(b, rows, view, gemm.biases(bias, "", None, None), residual=pos)
    return out


def normed(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    norm: Callable[[torch.Tensor], object],
) -> torch.Tensor:
    """Tokens [B, N, C]; norm(tokens) works in place, a stretch at a time."""
    patches = Patches(image, weight, None, None, dtype)
    out = native.empty((len(image), patches.per_image, len(weight)), dtype)
    b = gemm.matrix((weight,), dtype, patches.rows)
    for images, part, rows in patches.gathered():
        tokens = out[images, part]
        gemm.product(b, rows, tokens, gemm.biases(bias, "", None, None))
        norm(tokens)
    return out


def backward(grad, image, weight, bias, pos_embed, prefix, mean, std, dtype, out_dtype, wanted):
    inputs = (image, weight, bias, pos_embed, prefix)
    found = [
        t.new_empty(t.shape) if w and t is not None else grad.new_empty(0)
        for t, w in zip(inputs, wanted, strict=True)
    ]
    patches = Patches(image, weight, mean, std, dtype)
    n = patches.per_image
    p0 = grad.shape[1] - n
    if wanted[3]:
        _over_images(grad[:, grad.shape[1] - pos_embed.shape[1] :], found[3])
    if wanted[4]:
        _over_images(grad[:, :p0], found[4])
    if not (patches.rows and weight.shape[0]):
        return *(f.zero_() for f in found[:3]), *found[3:]
    dz = grad[:, p0:].to(dtype).reshape(patches.rows, -1)
    dz = dz if dz.stride(1) == 1 else dz.contiguous()
    if wanted[0]:
        _image_gradient(dz, weight, std, patches, found[0])
    if wanted[1]:
        _weight_gradient(dz, patches, found[1])
    if wanted[2]:
        _bias_gradient(dz, found[2])
    return tuple(found)


def _over_images(grad, found):
    """An embedding that all images share sums their gradients, in float32."""
    if found.shape[0] == grad.shape[0]:
        found.copy_(grad)
    else:
        found.copy_(grad.sum(0, keepdim=True, dtype=torch.float32))


def _image_gradient(dz, weight, std, patches, dimage):
    channels, rows, columns, p, q = patches.sizes
    matrix = gemm.matrix((weight,), patches.dtype, patches.rows, transposed=True)
    # Scaled before it is rounded to the image's dtype.
    dtype = dimage.dtype if std is None else torch.float32
    one = torch.empty((patches.per_image, patches.width), dtype=dtype, device=dz.device)
    for b, target in enumerate(dimage.view(-1, channels, rows, p, columns, q)):
        gemm.product(matrix, dz[b * len(one) : (b + 1) * len(one)], one)
        part = one.view(rows, columns, channels, p, q).permute(2, 0, 3, 1, 4)
        target.copy_(part if std is None else part / std.view(-1, 1, 1, 1, 1))


def _weight_gradient(dz, patches, dweight):
    exact = dweight.dtype == torch.float32 or patches.rows <= _MOST_SUMMED
    flat = dweight.view(dweight.shape[0], -1)
    total = flat if exact else torch.empty(flat.shape, dtype=torch.float32, device=flat.device)
    scratch = torch.empty(
        (min(_MOST_SUMMED, patches.rows), patches.width), dtype=patches.dtype, device=dz.device
    )
    for first in range(0, patches.rows, _MOST_SUMMED):
        count = min(_MOST_SUMMED, patches.rows - first)
        rows = patches.gather(first, count, scratch)
        b = gemm.matrix((rows,), patches.dtype, dz.shape[1], transposed=True)
        gemm.transposed_product(b, dz[first : first + count], total, accumulate=first > 0)
    if not exact:
        flat.copy_(total)


def _bias_gradient(dz, dbias):
    total = torch.empty(dbias.shape, dtype=torch.float32, device=dbias.device)
    native.native().linear_backward(
        *dz.shape, 0, gemm.rows_of(dz), None, None, None, None, native.address(total), 0,
        native.threads(),
    )  # fmt: skip
    dbias.copy_(total)


BACKEND = Backend("cpu", forward, can_run, backward, native.reasons)
