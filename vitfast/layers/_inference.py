"""The block in inference on the CPU: native kernels called directly, rows in cache-sized chunks.

Without autograd everything but the attention works row by row. So the rows go through in chunks: a
chunk's norm and qkv; after the attention its projection with LayerScale and residual, its norm, its
MLP. The MLP's wide hidden tensor exists for one chunk only, and stays in cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from vitfast.layers import _attention, _fits
from vitfast.layers._guard import Linear
from vitfast.layers._norm import Grn, Norm
from vitfast.ops import _gemm, _onednn
from vitfast.ops import _norm as norm_op
from vitfast.ops.attention import native as attention_op
from vitfast.ops.dwconv_norm import native as dwconv_op
from vitfast.ops.grn import native as grn_op
from vitfast.ops.patch_embed import native as patch_op
from vitfast.ops.window_attention import native as window_op
from vitfast.runtime.library import autocast_dtype

if TYPE_CHECKING:
    from vitfast.layers._attention import Windows
    from vitfast.layers._block import Block
    from vitfast.layers._convnext import ConvNeXt
    from vitfast.layers._mlp import Mlp

CHUNK_ROWS = 1024
WHOLE_ROWS = 2048
"""Up to so many rows go through as one chunk."""


def block(
    x: torch.Tensor,
    plan: Block,
    *,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    rope: torch.Tensor | None = None,
    is_causal: bool = False,
    windows: Windows | None = None,
) -> torch.Tensor | None:
    """The block on x [B, N, C], or None where it takes the public ops to compute or to complain.

    The result has the dtype that the residual stream has in timm.
    """
    steps = _steps(x, plan, mask, bias, rope, windows)
    if steps is None:
        return None
    if windows is not None:
        return _windowed(x, steps, windows)
    batch, tokens, channels = x.shape
    rows = x.reshape(-1, channels)
    qkv = [t.unflatten(0, (batch, tokens)) for t in steps.project(rows)]
    attended = _attend(_attention.split_heads(qkv, plan.attn), plan, mask, bias, rope, is_causal)
    del qkv  # as large as three maps
    out = _gemm.empty(rows.shape, steps.stream)
    steps.finish(rows, attended.view(len(rows), -1), out)
    return out.view(batch, tokens, channels)


def _steps(
    x: torch.Tensor,
    plan: Block,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    rope: torch.Tensor | None = None,
    windows: Windows | None = None,
) -> _Steps | None:
    lower = autocast_dtype(x.device)
    operand = lower or x.dtype
    stream = _fits.stream_dtype(x, plan, operand)
    if stream is None or not _fits.block(x, plan, lower, mask, bias, rope, windows):
        return None
    return _Steps(plan, x.shape[0] * x.shape[1], operand, stream)


def _attend(
    qkv: list[torch.Tensor],
    plan: Block,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    rope: torch.Tensor | None,
    is_causal: bool,
) -> torch.Tensor:
    q, k, v = qkv if len(qkv) == 3 else qkv[0].unbind(2)
    return attention_op.forward_direct(
        q,
        k,
        v,
        scale=q.shape[-1] ** -0.5,
        mask=mask,
        bias=bias,
        is_causal=is_causal,
        out=torch.empty(q.shape, dtype=q.dtype),
        **_attention.prologue(plan.attn, rope),
    )


def _windowed(x: torch.Tensor, steps: _Steps, windows: Windows) -> torch.Tensor:
    """The block on a map x [B, H W, C], from norm1 to the end in one chunk after the other.

    A chunk is some images, or some rows of windows of one. Only x and the result are as large as
    the map.
    """
    attn = steps.plan.attn
    batch, tokens, channels = x.shape
    (high, wide), window, shift, grid = windows
    width = attn.proj.weight.shape[1]
    heads = (attn.heads, width // attn.heads)
    terms = window_op.terms(*heads, attn.table, attn.padding(windows), attn.logit_scale)

    def run(
        rows: torch.Tensor, out: torch.Tensor, stripe: tuple[int, int] | None, high: int = high
    ) -> None:
        (qkv,) = steps.project(rows.view(-1, channels))
        qkv = qkv.view(len(rows) if stripe is None else 1, -1, wide, 3 * width)
        attended = _gemm.empty((*qkv.shape[:3], *heads), qkv.dtype)
        window_op.run(
            _attention.split_packed(qkv, attn), attended, (high, wide), window, shift, terms,
            grid=grid, stripe=stripe,
        )  # fmt: skip
        del qkv
        attended = attended.view(-1, width)
        steps.finish(rows.view(-1, channels), attended, out.view(-1, channels))

    out = _gemm.empty(x.shape, steps.stream)
    if tokens <= WHOLE_ROWS:
        images = max(1, WHOLE_ROWS // tokens)
        for rows, result in zip(x.contiguous().split(images), out.split(images), strict=True):
            run(rows, result, None)
        return out
    count = -(-high // window[0])
    step = max(1, CHUNK_ROWS // (window[0] * wide))
    if grid:  # Every count-th row belongs to the same windows: some of each are a map, too.
        maps = (t.view(batch, window[0], count, wide, channels) for t in (x.contiguous(), out))
        for image, result in zip(*maps, strict=True):
            for first in range(0, count, step):
                rows = image[:, first : first + step].contiguous()
                both = _gemm.empty(rows.shape, steps.stream)
                run(rows[None], both, None, rows.shape[0] * rows.shape[1])
                result[:, first : first + step] = both
        return out
    maps = (t.view(batch, high, wide, channels) for t in (x.contiguous(), out))
    for image, result in zip(*maps, strict=True):
        for first in range(0, count, step):
            stripe = first, min(first + step, count)
            # The stripe's rows of the map rolled back: those past its end are the first.
            begin, end = (min(i * window[0], high) + shift[0] for i in stripe)
            if end <= high:
                run(image[begin:end], result[begin:end], stripe)
                continue
            pieces = [slice(begin, high), slice(max(begin - high, 0), end - high)]
            rows = torch.cat([image[piece] for piece in pieces])
            both = _gemm.empty(rows.shape, steps.stream)
            run(rows, both, stripe)
            sizes = [max(high - begin, 0), end - max(begin, high)]
            for piece, part in zip(pieces, both.split(sizes), strict=True):
                result[piece] = part
    return out


def attention_half(x: torch.Tensor, plan: Block, windows: Windows) -> torch.Tensor | None:
    """x + gamma1 * attn(norm1(x)) alone, as `block`."""
    steps = _steps(x, plan, windows=windows)
    if steps is None:
        return None
    steps.whole = False
    return _windowed(x, steps, windows)


def mlp_half(x: torch.Tensor, plan: Block) -> torch.Tensor | None:
    """x + gamma2 * mlp(norm2(x)) alone, as `block`."""
    steps = _steps(x, plan)
    if steps is None:
        return None
    rows = x.reshape(-1, x.shape[-1])
    out = _gemm.empty(rows.shape, steps.stream)
    for chunk in _chunks(len(rows)):
        steps.mlp_half(rows[chunk], out[chunk])
    return out.view(x.shape)


class Merge(NamedTuple):
    """Swin's downsampling: reduction(norm(patches)), or the norm last."""

    reduction: Linear
    norm: Norm
    norm_last: bool


def merge(x: torch.Tensor, plan: Merge) -> torch.Tensor | None:
    """2x2 patches of a map x [B, H, W, C] reduced; None where it is for the public ops."""
    lower = autocast_dtype(x.device)
    operand = lower or x.dtype
    if not _fits.on_cpu(x, lower):
        return None
    shape = norm_op.merged_shape(x)
    weight, bias = plan.reduction
    dtypes = norm_op.DTYPES if lower else (x.dtype,)
    width = len(weight) if plan.norm_last else shape[-1]
    if not (
        _fits.tensor(weight, (len(weight), shape[-1]), dtypes)
        and _fits.vector(bias, len(weight), dtypes)
        and _fits.vector(plan.norm.weight, width)
        and _fits.vector(plan.norm.bias, width)
    ):
        return None
    batch, high, wide, _ = shape
    rows = batch * high * wide
    reduction = _linear(plan.reduction, rows, operand)

    def patches(part: torch.Tensor) -> torch.Tensor:
        if plan.norm_last:
            found = norm_op.forward(norm_op.NONE, part, out_dtype=operand, merge=True)[0]
        else:
            found = norm_op.forward(
                norm_op.KINDS[plan.norm.kind], part, weight=plan.norm.weight, bias=plan.norm.bias,
                eps=plan.norm.eps, out_dtype=operand, merge=True,
            )[1]  # fmt: skip
        y = reduction(found.view(-1, shape[-1]))
        return _normalise(y, plan.norm, y) if plan.norm_last else y

    if rows <= WHOLE_ROWS:
        return patches(x).view(batch, high, wide, -1)
    out = _gemm.empty((batch, high, wide, len(weight)), operand)
    step = max(1, CHUNK_ROWS // wide)
    for image, result in zip(x, out, strict=True):
        for first in range(0, high, step):
            part = image[None, 2 * first : 2 * (first + step)]
            result[first : first + step] = patches(part).view(-1, wide, len(weight))
    return out


def embed(
    image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: Norm
) -> torch.Tensor | None:
    """norm(tokens) [B, N, C] of an image's patches; None where it is for the public ops.

    Tokens are normalised while they are in the cache.
    """
    lower = autocast_dtype(image.device)
    operand = lower or image.dtype
    dtypes = norm_op.DTYPES if lower else (image.dtype,)
    channels = len(weight)
    if not (
        _fits.on_cpu(image, lower)
        and image.shape[1] == weight.shape[1]
        and weight.dtype in dtypes
        and weight.is_cpu
        and _fits.vector(bias, channels, dtypes)
        and _fits.vector(norm.weight, channels)
        and _fits.vector(norm.bias, channels)
    ):
        return None
    return patch_op.normed(image, weight, bias, operand, lambda x: _normalise(x, norm, x))


def downsample(
    image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: Norm
) -> torch.Tensor | None:
    """Patches [B, N, C'] of norm(image), over channels, a stripe at a time; None as of `embed`."""
    lower = autocast_dtype(image.device)
    operand = lower or image.dtype
    dtypes = norm_op.DTYPES if lower else (image.dtype,)
    batch, channels, high, wide = image.shape
    width, _, height, across = weight.shape
    if not (
        _fits.on_cpu(image, lower)
        and _fits.tensor(weight, (width, channels, height, across), dtypes)
        and _fits.vector(bias, width, dtypes)
        and _fits.vector(norm.weight, channels)
        and _fits.vector(norm.bias, channels)
    ):
        return None
    lines, columns = high // height, wide // across
    out = _gemm.empty((batch, lines, columns, width), operand)
    linear = _linear(Linear(weight, bias), batch * lines * columns, operand)
    x = image.permute(0, 2, 3, 1).contiguous()
    for images, stripes in _stripes(batch, lines, columns):
        for first, last in stripes:
            part = x[images, first * height : last * height]
            normed = _normalise(part, norm, _gemm.empty(part.shape, operand))
            patches = patch_op.Patches(normed.permute(0, 3, 1, 2), weight, None, None, operand)
            rows = torch.empty((patches.rows, patches.width), dtype=operand)
            out[images, first:last] = linear(patches.gather(0, patches.rows, rows)).view(
                len(part), last - first, columns, width
            )
    return out.view(batch, -1, width)


def convnext(x: torch.Tensor, plan: ConvNeXt) -> torch.Tensor | None:
    """ConvNeXt's block on a map x [B, H, W, C], some lines or images at a time.

    None where it is for the public ops.
    """
    lower = autocast_dtype(x.device)
    if not _fits.convnext(x, plan, lower):
        return None
    operand = lower or x.dtype
    scaled = operand if plan.gamma is None else torch.promote_types(operand, plan.gamma.dtype)
    x = x.contiguous()
    out = _gemm.empty(x.shape, torch.promote_types(x.dtype, scaled))
    batch, high, wide, _ = x.shape
    mlp = plan.mlp
    hidden_of, fc2 = _mlp(mlp, batch * high * wide, operand)
    for images, stripes in _stripes(batch, high, wide):
        part, result = x[images], out[images]
        if mlp.grn is None:
            for lines in stripes:
                hidden = hidden_of(_convolved(part, plan, lines, operand))
                _add_lines(part, fc2(hidden), plan.gamma, result, lines)
            continue
        hiddens = [hidden_of(_convolved(part, plan, lines, operand)) for lines in stripes]
        scales = _responses(hiddens, len(part), mlp.grn)
        for lines, hidden in zip(stripes, hiddens, strict=True):
            _respond(hidden, scales, mlp.grn.bias)
            _add_lines(part, fc2(hidden), plan.gamma, result, lines)
    return out


def _stripes(batch: int, high: int, wide: int) -> list[tuple[slice, list[tuple[int, int]]]]:
    """Some images and all of their lines, or one and some at a time."""
    if high * wide <= WHOLE_ROWS:
        images = WHOLE_ROWS // (high * wide)
        return [(slice(i, i + images), [(0, high)]) for i in range(0, batch, images)]
    step = max(1, CHUNK_ROWS // wide)
    lines = [(i, min(i + step, high)) for i in range(0, high, step)]
    return [(slice(i, i + 1), lines) for i in range(batch)]


def _convolved(
    x: torch.Tensor, plan: ConvNeXt, lines: tuple[int, int], operand: torch.dtype
) -> torch.Tensor:
    """norm(conv(x)) of some lines: [rows, C]."""
    norm = plan.norm
    normed = dwconv_op.run(
        x, *plan.conv, norm.weight, norm.bias, norm.eps, norm=norm.kind, dtype=operand,
        out_dtype=operand, rows=lines,
    )  # fmt: skip
    return normed.view(-1, x.shape[3])


def _responses(hiddens: list[list[torch.Tensor]], images: int, grn: Grn) -> torch.Tensor:
    """1 + weight * n [images, 4C] of a global response norm, from all rows of the images."""
    widths = [piece.shape[1] for piece in hiddens[0]]
    sums = [torch.zeros((images, width), dtype=torch.float64) for width in widths]
    for hidden in hiddens:
        for piece, totals in zip(hidden, sums, strict=True):
            for one, total in zip(piece.chunk(images), totals, strict=True):
                grn_op.accumulate(one, total)
    return grn_op.scale_of(torch.cat(sums, 1), grn.weight, grn.eps)


def _respond(hidden: list[torch.Tensor], scales: torch.Tensor, bias: torch.Tensor) -> None:
    """bias + scale * hidden in place, by image and piece of columns."""
    widths = [piece.shape[1] for piece in hidden]
    columns = scales.split(widths, 1), bias.float().split(widths)
    for piece, factors, shift in zip(hidden, *columns, strict=True):
        for one, factor in zip(piece.chunk(len(scales)), factors, strict=True):
            base = shift.expand(one.shape)
            one.copy_(norm_op.forward(norm_op.NONE, base, branch=one, gamma=factor)[0])


def _add_lines(
    x: torch.Tensor,
    branch: torch.Tensor,
    gamma: torch.Tensor | None,
    out: torch.Tensor,
    lines: tuple[int, int],
) -> None:
    """x + gamma * branch, of some lines of maps."""
    part, result = (t[:, slice(*lines)].view(branch.shape) for t in (x, out))
    _add(part, branch, gamma, result)


class _Steps:
    """The steps of a block that work row by row, ready to run on any of `rows` rows."""

    def __init__(self, plan: Block, rows: int, operand: torch.dtype, stream: torch.dtype) -> None:
        attn, mlp = plan.attn, plan.mlp
        self.plan, self.operand, self.stream = plan, operand, stream
        self.whole = True  # else `finish` stops at the first residual add
        self._qkv = [_linear(linear, rows, operand) for linear in attn.qkv]
        self._proj = _linear(attn.proj, rows, operand)
        self._hidden, self._fc2 = _mlp(mlp, rows, operand)
        self._normed = _gemm.empty((min(rows, WHOLE_ROWS), len(attn.proj.weight)), operand)

    def project(self, x: torch.Tensor) -> list[torch.Tensor]:
        """norm1 and the projection(s) to q, k and v: [rows, 3 A], or three of [rows, A]."""
        chunks = _chunks(len(x))
        if len(chunks) == 1:
            part = self._to_qkv(x)
            return [layer(part) for layer in self._qkv]
        sizes = [linear.weight.shape[0] for linear in self.plan.attn.qkv]
        results = [_gemm.empty((len(x), size), self.operand) for size in sizes]
        for chunk in chunks:
            part = self._to_qkv(x[chunk])
            for layer, result in zip(self._qkv, results, strict=True):
                result[chunk] = layer(part)
        return results

    def _to_qkv(self, x: torch.Tensor) -> torch.Tensor:
        if not self.plan.norms_last:
            return _normalise(x, self.plan.norm1, self._normed[: len(x)])
        return x.to(self.operand)

    def finish(self, x: torch.Tensor, attended: torch.Tensor, out: torch.Tensor) -> None:
        """Everything after the attention, into `out` [rows, C]."""
        norm = self.plan.attn.norm
        for chunk in _chunks(len(x)):
            part = attended[chunk]
            if norm is not None:
                part = _normalise(part, norm, part)
            finish = self._norm_last if self.plan.norms_last else self._norm_first
            finish(x[chunk], self._proj(part), out[chunk])

    def _norm_first(self, x: torch.Tensor, branch: torch.Tensor, out: torch.Tensor) -> None:
        plan = self.plan
        if not self.whole:
            _add(x, branch, plan.gamma1, out)
            return
        part = norm_op.forward(
            norm_op.KINDS[plan.norm2.kind],
            x,
            branch=branch,
            gamma=plan.gamma1,
            weight=plan.norm2.weight,
            bias=plan.norm2.bias,
            eps=plan.norm2.eps,
            residual_out=out,
            normed_out=self._normed[: len(x)],
        )[1]
        _add(out, self._mlp(part), plan.gamma2, out)

    def mlp_half(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """x + gamma2 * mlp(norm2(x)) into `out`."""
        part = _normalise(x, self.plan.norm2, self._normed[: len(x)])
        _add(x, self._mlp(part), self.plan.gamma2, out)

    def _norm_last(self, x: torch.Tensor, branch: torch.Tensor, out: torch.Tensor) -> None:
        _add_normed(x, branch, self.plan.norm1, out)
        _add_normed(out, self._mlp(out.to(self.operand)), self.plan.norm2, out)

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        hidden, norm = self._hidden(x), self.plan.mlp.norm
        if norm is not None:
            _normalise(hidden[0], norm, hidden[0])
        return self._fc2(hidden)


def _add(
    x: torch.Tensor, branch: torch.Tensor, gamma: torch.Tensor | None, out: torch.Tensor
) -> None:
    norm_op.forward(norm_op.NONE, x, branch=branch, gamma=gamma, residual_out=out)


def _add_normed(x: torch.Tensor, branch: torch.Tensor, norm: Norm, out: torch.Tensor) -> None:
    norm_op.forward(
        norm_op.KINDS[norm.kind],
        branch,
        weight=norm.weight,
        bias=norm.bias,
        eps=norm.eps,
        base=x,
        normed_out=out,
    )


def _mlp(
    mlp: Mlp, rows: int, dtype: torch.dtype
) -> tuple[
    Callable[[torch.Tensor], list[torch.Tensor]], Callable[[list[torch.Tensor]], torch.Tensor]
]:
    """The two halves of an MLP: to its hidden tensor, in pieces of columns, and from there."""
    plain = mlp.packed is None and mlp.gate is None and mlp.norm is None
    if (
        plain
        and not _onednn.reasons(*mlp.fc1, dtype, mlp.act)
        and not _onednn.reasons(*mlp.fc2, dtype, "none")
    ):
        both = _onednn.prepare_mlp(*mlp.fc1, *mlp.fc2, rows, dtype, mlp.act)
        return both.hidden, both
    fc1 = _linear(mlp.fc1, rows, dtype, mlp.act, mlp.packed, mlp.gate)
    fc2 = _linear(mlp.fc2, rows, dtype)
    return lambda x: [fc1(x)], lambda hidden: fc2(hidden[0])


def _linear(
    linear: Linear,
    rows: int,
    dtype: torch.dtype,
    act: str = "none",
    packed: str | None = None,
    gate: Linear | None = None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The faster of oneDNN and our own kernel, which has every activation and gate."""
    if packed is None and gate is None and not _onednn.reasons(*linear, dtype, act):
        return _onednn.prepare(*linear, rows, dtype, act)
    gate_weight, gate_bias = gate or (None, None)
    layer = _gemm.prepare(
        *linear, rows, dtype, gate=packed, gate_weight=gate_weight, gate_bias=gate_bias
    )
    return partial(_gemm.apply, layer, act=act)


def _normalise(x: torch.Tensor, norm: Norm, out: torch.Tensor) -> torch.Tensor:
    norm_op.forward(
        norm_op.KINDS[norm.kind],
        x,
        weight=norm.weight,
        bias=norm.bias,
        eps=norm.eps,
        normed_out=out,
    )
    return out


def _chunks(rows: int) -> list[slice]:
    """Consecutive row ranges, the first the largest."""
    if rows <= WHOLE_ROWS:
        return [slice(0, rows)]
    return [slice(i, min(i + CHUNK_ROWS, rows)) for i in range(0, rows, CHUNK_ROWS)]
