"""patch_embed on the kernels of csrc/cpu/patchify.cpp and csrc/cpu/gemm.cpp.

Patches are gathered a stretch at a time, so that they stay in the cache until they are multiplied
and the whole patch matrix never exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from vitfast.ops.common import gemm
from vitfast.ops.patch_embed.reference import INPUTS, Call
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend
from vitfast.runtime.native import DTYPE_CODES

_STRETCH_BYTES, _LEAST_ROWS = 2 << 20, 64
"""Bytes of patches gathered at a time, about the size of a core's second-level cache, but so many
rows at least: products of fewer read the weight too often. Chosen, not measured yet."""
_MOST_SUMMED = 2048
"""Rows of patches packed at a time for the weight's gradient: bounds the memory, and the sums.
Chosen, not measured yet."""


def can_run(call: Call) -> list[str]:
    image = call.image
    why = gemm.reasons(call.weight, call.bias, call.pos_embed, call.prefix)
    if image.dtype not in (*gemm.DTYPES, torch.uint8):
        why.append(f"images of {image.dtype} are not implemented, float32, bfloat16, uint8 are")
    for t in {call.dtype, call.out_dtype} - set(gemm.DTYPES):
        why.append(f"{t} is not implemented, float32 and bfloat16 are")
    return why


class Patches:
    """The rows of patches of a batch of images, gathered on demand.

    Args:
        image, weight, mean, std: as in `Call`; of the weight the shape alone.
        dtype: of the rows.
    """

    def __init__(
        self,
        image: torch.Tensor,
        weight: torch.Tensor,
        mean: torch.Tensor | None,
        std: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
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


def _affine(
    dtype: torch.dtype, channels: int, mean: torch.Tensor | None, std: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
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


def forward(call: Call) -> torch.Tensor:
    patches = Patches(call.image, call.weight, call.mean, call.std, call.dtype)
    n, p0, pos_embed = patches.per_image, call.prefix_tokens, call.pos_embed
    out = native.empty((call.image.shape[0], p0 + n, call.weight.shape[0]), call.out_dtype)
    if not out.numel():
        return out
    head = None
    if pos_embed is not None and pos_embed.shape[1] == p0 + n:  # it covers the prefix, too
        head, pos_embed = pos_embed[:, :p0], pos_embed[:, p0:]
    if call.prefix is not None and p0:
        out[:, :p0] = call.prefix if head is None else call.prefix + head
    if not n:
        return out
    b = gemm.matrix((call.weight,), call.dtype, patches.rows)
    bias = gemm.biases(call.bias, "", None, None)
    for images, part, rows in patches.gathered():
        view = out[images, p0 + part.start : p0 + part.stop]
        pos = None
        if pos_embed is not None:
            pos = pos_embed[images] if pos_embed.shape[0] > 1 else pos_embed
            pos = pos[:, part].expand(view.shape)
        gemm.product(b, rows, view, bias, residual=pos)
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


def backward(grad: torch.Tensor, call: Call, wanted: list[bool]) -> tuple[torch.Tensor, ...]:
    tensors = (getattr(call, name) for name in INPUTS)
    found = {
        name: t.new_empty(t.shape) if w and t is not None else grad.new_empty(0)
        for name, t, w in zip(INPUTS, tensors, wanted, strict=True)
    }
    is_wanted = dict(zip(INPUTS, wanted, strict=True))
    patches = Patches(call.image, call.weight, call.mean, call.std, call.dtype)
    p0 = grad.shape[1] - patches.per_image
    if is_wanted["pos_embed"]:
        _over_images(grad[:, grad.shape[1] - found["pos_embed"].shape[1] :], found["pos_embed"])
    if is_wanted["prefix"]:
        _over_images(grad[:, :p0], found["prefix"])
    if not (patches.rows and call.weight.shape[0]):
        for name in ("image", "weight", "bias"):
            found[name].zero_()
        return tuple(found.values())
    dz = grad[:, p0:].to(call.dtype).reshape(patches.rows, -1)
    dz = dz if dz.stride(1) == 1 else dz.contiguous()
    if is_wanted["image"]:
        _image_gradient(dz, call, patches, found["image"])
    if is_wanted["weight"]:
        _weight_gradient(dz, patches, found["weight"])
    if is_wanted["bias"]:
        _bias_gradient(dz, found["bias"])
    return tuple(found.values())


def _over_images(grad: torch.Tensor, found: torch.Tensor) -> None:
    """An embedding that all images share sums their gradients, in float32."""
    if found.shape[0] == grad.shape[0]:
        found.copy_(grad)
    else:
        found.copy_(grad.sum(0, keepdim=True, dtype=torch.float32))


def _image_gradient(dz: torch.Tensor, call: Call, patches: Patches, dimage: torch.Tensor) -> None:
    """Writes dimage [B, Cin, H, W] from dz [B N, C], the gradient of the products."""
    std = call.std
    channels, rows, columns, p, q = patches.sizes
    matrix = gemm.matrix((call.weight,), patches.dtype, patches.rows, transposed=True)
    # Scaled before it is rounded to the image's dtype.
    dtype = dimage.dtype if std is None else torch.float32
    one = torch.empty((patches.per_image, patches.width), dtype=dtype, device=dz.device)
    for b, target in enumerate(dimage.view(-1, channels, rows, p, columns, q)):
        gemm.product(matrix, dz[b * len(one) : (b + 1) * len(one)], one)
        part = one.view(rows, columns, channels, p, q).permute(2, 0, 3, 1, 4)
        target.copy_(part if std is None else part / std.view(-1, 1, 1, 1, 1))


def _weight_gradient(dz: torch.Tensor, patches: Patches, dweight: torch.Tensor) -> None:
    """Writes dweight [C, Cin, P, P'] from dz [B N, C], a stretch of rows at a time."""
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


def _bias_gradient(dz: torch.Tensor, dbias: torch.Tensor) -> None:
    """Writes dbias [C], the sums of dz [B N, C] over rows, added up in float32."""
    total = torch.empty(dbias.shape, dtype=torch.float32, device=dbias.device)
    native.native().linear_backward(
        *dz.shape, 0, gemm.rows_of(dz), None, None, None, None, native.address(total), 0,
        native.threads(),
    )  # fmt: skip
    dbias.copy_(total)


BACKEND = Backend("cpu", forward, can_run, backward, native.reasons)
