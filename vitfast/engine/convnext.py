"""ConvNeXt's block in inference on the CPU, and the parts of it that other blocks have.

Some lines or images go through at a time, so that a convolution's result and the MLP's hidden
tensor stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from vitfast.engine import checks, donation, memo
from vitfast.engine import rows as by_rows
from vitfast.engine.products.linear import PreparedMlp, prepare_mlp
from vitfast.ops.common import norm as norm_op
from vitfast.ops.dwconv_norm import native as dwconv_op
from vitfast.ops.grn import native as grn_op
from vitfast.plans import ConvNeXtBlock, Grn, MlpResidual, Norm
from vitfast.runtime import native
from vitfast.runtime.library import autocast_dtype
from vitfast.settings import settings

_CONVOLVED_BYTES = 4 << 20
"""Of a convolution's results at a time: each stripe of lines reads those around it again. Measured
on a Zen 3 EPYC with two threads, ConvNeXt-T at 448: 1.08 of the best time at 1 MiB; 1.00 to 1.04,
as good as noise, from 2 to 16 MiB."""
_HIDDEN_BYTES = 3 << 20
_LEAST_ROWS = 512
"""Of an MLP's hidden tensor at a time, and rows at least. Measured there: 1.03 of the best time at
0.75 MiB, 1.02 at 1.5, 1.00 to 1.01 from 3 to 12. The rows are chosen, not measured yet."""


def block(x: torch.Tensor, plan: ConvNeXtBlock) -> torch.Tensor | None:
    """ConvNeXt's block on a map x [B, H, W, C], some lines or images at a time.

    None where it is for the public ops.
    """
    return memo.call(_run, _prepare, by_rows.count(x), x, plan)


def _run(steps: _PreparedConvNeXt, x: torch.Tensor) -> torch.Tensor:
    plan, operand, dtype, halves = steps
    x = x.contiguous()
    mlp = plan.mlp
    if _reach(plan) <= _step(x, operand):
        out = donation.result(x, x.shape, dtype)
    else:  # a stripe of lines reads more than the next one's
        out = native.empty(x.shape, dtype)
    ahead = out.data_ptr() == x.data_ptr()
    rows_in, rows_out = (t.view(-1, t.shape[3]) for t in (x, out))

    def finish(rows: slice, hidden: Sequence[torch.Tensor]) -> None:
        before, after = by_rows.part(rows_in, rows), by_rows.part(rows_out, rows)
        halves.add_to(before, plan.gamma, hidden, after)

    for images, pieces in _convolved(x, plan, operand, ahead):
        found: Iterator[tuple[slice, Sequence[torch.Tensor]]]
        found = ((rows, halves.hidden(normed)) for rows, normed in pieces())
        if mlp.grn is not None:
            if settings.memory == "low":  # computed twice: all of it is as large as four maps
                first = (halves.hidden(normed) for _, normed in pieces())
                scales = _responses(first, images, mlp.grn)
            else:
                kept = list(found)
                scales = _responses((hidden for _, hidden in kept), images, mlp.grn)
                found = iter(kept)
        for rows, hidden in found:
            if mlp.grn is not None:
                _respond(hidden, scales, mlp.grn.bias)
            finish(rows, hidden)
    return out


def _prepare(
    x: torch.Tensor, plan: ConvNeXtBlock, autocast: torch.dtype | None
) -> _PreparedConvNeXt | None:
    if not checks.convnext(x, plan, autocast):
        return None
    operand = autocast or x.dtype
    scaled = operand if plan.gamma is None else torch.promote_types(operand, plan.gamma.dtype)
    halves = prepare_mlp(plan.mlp, by_rows.count(x), operand)
    return _PreparedConvNeXt(plan, operand, torch.promote_types(x.dtype, scaled), halves)


class _PreparedConvNeXt(NamedTuple):
    """A block ready to run. dtype: of the result."""

    plan: ConvNeXtBlock
    operand: torch.dtype
    dtype: torch.dtype
    halves: PreparedMlp


Piece = tuple[slice, torch.Tensor]


def _reach(plan: ConvNeXtBlock) -> int:
    """Lines above and below one that its convolution reads."""
    return plan.conv.weight.shape[2] // 2


def _rows_at_once(x: torch.Tensor, operand: torch.dtype) -> int:
    return max(_CONVOLVED_BYTES // (x.shape[3] * operand.itemsize), by_rows.CHUNK_ROWS)


def _step(x: torch.Tensor, operand: torch.dtype) -> int:
    """Lines of a stripe of maps [B, H, W, C]; the last of an image may have fewer."""
    return _rows_at_once(x, operand) // x.shape[2]


def _convolved(
    x: torch.Tensor, plan: ConvNeXtBlock, operand: torch.dtype, ahead: bool = False
) -> Iterator[tuple[int, Callable[[], Iterator[Piece]]]]:
    """norm(conv(x)) of contiguous maps, by group of images: how many, and what computes its pieces.

    A piece is some of the B * H * W rows and what they are. It holds all of every image if it holds
    several images' and there is a global response norm.

    Args:
        ahead: whether what a piece is of may be written to before the next is asked for.
    """
    batch, high, wide, channels = x.shape
    at_once = _rows_at_once(x, operand)
    most = max(_HIDDEN_BYTES // (len(plan.mlp.fc1.weight) * operand.itemsize), _LEAST_ROWS)
    for images, stripes in by_rows.stripes(batch, high, wide, at_once):
        count = images.stop - images.start
        whole = plan.mlp.grn is not None and count > 1
        step = count * high * wide if whole else most
        yield count, partial(_pieces, x, plan, operand, images, stripes, step, ahead)


def _pieces(
    x: torch.Tensor,
    plan: ConvNeXtBlock,
    operand: torch.dtype,
    images: slice,
    stripes: list[tuple[int, int]],
    most: int,
    ahead: bool,
) -> Iterator[Piece]:
    """Those of some images' stripes of lines, of at most so many rows."""
    found = _stripes(x, plan, operand, images, stripes)
    for start, normed in _one_ahead(found) if ahead else found:
        count = normed.shape[0]
        for i in range(0, count, most):
            last = min(i + most, count)
            yield slice(start + i, start + last), by_rows.part(normed, slice(i, last))


def _one_ahead(stripes: Iterator[tuple[int, torch.Tensor]]) -> Iterator[tuple[int, torch.Tensor]]:
    """Each stripe after the one behind it was computed, which reads lines of this one's input."""
    stripe = next(stripes, None)
    while stripe is not None:
        behind = next(stripes, None)
        yield stripe
        stripe = behind


def _stripes(
    x: torch.Tensor,
    plan: ConvNeXtBlock,
    operand: torch.dtype,
    images: slice,
    stripes: list[tuple[int, int]],
) -> Iterator[tuple[int, torch.Tensor]]:
    norm, conv = plan.norm, plan.conv
    assert isinstance(norm, Norm)  # `checks.convolved` saw to it
    _, high, wide, channels = x.shape
    for first, last in stripes:
        normed = dwconv_op.run(
            by_rows.part(x, images), conv.weight, conv.bias, norm.weight, norm.bias, norm.eps,
            norm=norm.kind, dtype=operand, out_dtype=operand, rows=(first, last),
        ).view(-1, channels)  # fmt: skip
        yield (images.start * high + first) * wide, normed


def _responses(hiddens: Iterable[Sequence[torch.Tensor]], images: int, grn: Grn) -> torch.Tensor:
    """1 + weight * n [images, 4C] of a global response norm, from all rows of the images."""
    sums = torch.empty((images, len(grn.weight)), dtype=torch.float64, device="cpu")
    for i, hidden in enumerate(hiddens):
        widths = [piece.shape[1] for piece in hidden]
        for piece, totals in zip(hidden, sums.split(widths, 1), strict=True):
            for one, total in zip(piece.chunk(images), totals, strict=True):
                grn_op.accumulate(one, total, adds=i > 0)
    return grn_op.scale_of(sums, grn.weight, grn.eps)


def _respond(hidden: Sequence[torch.Tensor], scales: torch.Tensor, bias: torch.Tensor) -> None:
    """bias + scale * hidden in place, by image and piece of columns."""
    widths = [piece.shape[1] for piece in hidden]
    columns = scales.split(widths, 1), bias.float().split(widths)
    for piece, factors, shift in zip(hidden, *columns, strict=True):
        for one, factor in zip(piece.chunk(len(scales)), factors, strict=True):
            base = shift.expand(one.shape)
            out = one if one.dtype == base.dtype else native.empty(one.shape, base.dtype)
            norm_op.forward(norm_op.NONE, base, branch=one, gamma=factor, residual_out=out)
            if out is not one:
                norm_op.forward(norm_op.NONE, out, residual_out=one)


def branch(x: torch.Tensor, plan: ConvNeXtBlock) -> torch.Tensor | None:
    """mlp(norm(conv(x))) [B, H, W, C'] of a map x [B, H, W, C]; None where it is for the ops."""
    steps = memo.recall(_prepare_branch, by_rows.count(x), x, plan)
    if steps is None:
        return None
    operand, halves = steps
    x = x.contiguous()
    out = native.empty((*x.shape[:3], len(plan.mlp.fc2.weight)), operand)
    rows_out = out.view(-1, out.shape[3])
    for _, pieces in _convolved(x, plan, operand):
        for rows, normed in pieces():
            rows_out[rows] = halves(halves.hidden(normed))
    return out


def _prepare_branch(
    x: torch.Tensor, plan: ConvNeXtBlock, autocast: torch.dtype | None
) -> tuple[torch.dtype, PreparedMlp] | None:
    if plan.mlp.grn is not None or not checks.convolved(x, plan, autocast):
        return None
    operand = autocast or x.dtype
    return operand, prepare_mlp(plan.mlp, by_rows.count(x), operand)


def mlp_residual(x: torch.Tensor, y: torch.Tensor, plan: MlpResidual) -> torch.Tensor | None:
    """x + gamma * mlp(y), of maps [B, H, W, C]; None where it is for the public ops."""
    autocast = autocast_dtype(x.device)
    if not checks.mlp_residual(x, y, plan, autocast):
        return None
    operand, channels = autocast or x.dtype, x.shape[3]
    scaled = operand if plan.gamma is None else torch.promote_types(operand, plan.gamma.dtype)
    out = native.empty(x.shape, torch.promote_types(x.dtype, scaled))
    base, inner = (t.contiguous().view(-1, channels) for t in (x, y))
    halves = prepare_mlp(plan.mlp, len(base), operand)
    results = out.view(base.shape)
    for before, rows, after in by_rows.in_chunks(base, inner, results):
        hidden = halves.hidden(rows.to(operand))
        halves.add_to(before, plan.gamma, hidden, after)
    return out
