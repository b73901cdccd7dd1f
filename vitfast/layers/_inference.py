"""The block in inference on the CPU: native kernels called directly, rows in cache-sized chunks.

Without autograd everything but the attention works row by row. So the rows go through in chunks: a
chunk's norm and qkv; after the attention its projection with LayerScale and residual, its norm, its
MLP. The MLP's wide hidden tensor exists for one chunk only, and stays in cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vitfast.layers import _fits, _memo, _rows
from vitfast.ops._weight_cache import CACHE
from vitfast.ops.attention import native as attention_op
from vitfast.ops.common import norm as norm_op
from vitfast.ops.window_attention import native as window_op
from vitfast.plans import (
    Attention,
    Norm,
    TransformerBlock,
    Windows,
    prologue,
    split_heads,
    split_packed,
)
from vitfast.runtime import native

if TYPE_CHECKING:
    pass
    pass
    pass


def block(
    x: torch.Tensor,
    plan: TransformerBlock,
    *,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    rope: torch.Tensor | None = None,
    is_causal: bool = False,
    windows: Windows | None = None,
    half: str = "",
) -> torch.Tensor | None:
    """The block on x [B, N, C], or None where it takes the public ops to compute or to complain.

    The result has the dtype that the residual stream has in timm.

    Args:
        half: "attention" or "mlp" for that half alone; the other need not have been read.
    """
    rows = _rows.count(x)
    if half == "mlp":
        return _memo.call(_mlp_half, _steps, rows, x, plan, None, half)
    if windows is not None:
        return _memo.call(_windowed, _steps, rows, x, plan, windows, half)
    if mask is None and bias is None:
        run = _causal if is_causal else _whole
        besides = () if rope is None else (rope,)
        if rope is None or (x.ndim == 3 and _fits.terms(x, plan, mask, bias, rope)):
            return _memo.call(run, _steps, rows, x, plan, None, half, besides=besides)
        return None
    steps = _memo.recall(_steps, rows, x, plan, None, half)
    if steps is None or not _fits.terms(x, plan, mask, bias, rope):
        return None
    return _whole(steps, x, rope, mask, bias, is_causal)


def _causal(steps: _Steps, x: torch.Tensor, rope: torch.Tensor | None = None) -> torch.Tensor:
    return _whole(steps, x, rope, is_causal=True)


def _whole(
    steps: _Steps,
    x: torch.Tensor,
    rope: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    plan = steps.plan
    batch, tokens, channels = x.shape
    rows = x.reshape(-1, channels)
    qkv = [t.unflatten(0, (batch, tokens)) for t in steps.project(rows)]
    attended = _attend(split_heads(qkv, plan.attn), plan, mask, bias, rope, is_causal)
    del qkv  # as large as three maps
    out = native.empty(rows.shape, steps.stream)
    steps.finish(rows, attended.view(len(rows), -1), out)
    return out.view(batch, tokens, channels)


def _steps(
    x: torch.Tensor,
    plan: TransformerBlock,
    lower: torch.dtype | None,
    windows: Windows | None,
    half: str,
) -> _Steps | None:
    operand = lower or x.dtype
    stream = _fits.stream_dtype(x, plan, operand, half)
    if stream is None or not _fits.block(x, plan, lower, windows, half):
        return None
    return _Steps(plan, _rows.count(x), operand, stream, windows, half)


def _attend(
    qkv: list[torch.Tensor],
    plan: TransformerBlock,
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
        out=torch.empty(q.shape, dtype=q.dtype, device=q.device),
        **prologue(plan.attn, rope),
    )


def _windowed(steps: _Steps, x: torch.Tensor) -> torch.Tensor:
    """The block on a map x [B, H W, C], from norm1 to the end in one chunk after the other.

    A chunk is some images, or some rows of windows of one. Only x and the result are as large as
    the map.
    """
    attn, windows = steps.plan.attn, steps.windows
    assert windows is not None
    batch, tokens, channels = x.shape
    (high, wide), window, shift, grid = windows
    width = attn.proj.weight.shape[1]
    heads = (attn.heads, width // attn.heads)

    def run(
        rows: torch.Tensor, out: torch.Tensor, stripe: tuple[int, int] | None, high: int = high
    ) -> None:
        (qkv,) = steps.project(rows.view(-1, channels))
        qkv = qkv.view(len(rows) if stripe is None else 1, -1, wide, 3 * width)
        attended = native.empty((*qkv.shape[:3], *heads), qkv.dtype)
        window_op.run(
            split_packed(qkv, attn), attended, (high, wide), window, shift, steps.terms,
            grid=grid, stripe=stripe,
        )  # fmt: skip
        del qkv
        attended = attended.view(-1, width)
        steps.finish(rows.view(-1, channels), attended, out.view(-1, channels))

    out = native.empty(x.shape, steps.stream)
    if tokens <= _rows.WHOLE_ROWS:
        images = max(1, _rows.WHOLE_ROWS // tokens)
        for rows, result in zip(x.contiguous().split(images), out.split(images), strict=True):
            run(rows, result, None)
        return out
    count = -(-high // window[0])
    step = max(1, _rows.CHUNK_ROWS // (window[0] * wide))
    if grid:  # Every count-th row belongs to the same windows: some of each are a map, too.
        maps = (t.view(batch, window[0], count, wide, channels) for t in (x.contiguous(), out))
        for image, result in zip(*maps, strict=True):
            for first in range(0, count, step):
                rows = image[:, first : first + step].contiguous()
                both = native.empty(rows.shape, steps.stream)
                run(rows[None], both, None, rows.shape[0] * rows.shape[1])
                result[:, first : first + step] = both
        return out
    maps = (t.view(batch, high, wide, channels) for t in (x.contiguous(), out))
    for image, result in zip(*maps, strict=True):
        for first in range(0, count, step):
            stripe = first, min(first + step, count)
            # The stripe's rows of the map rolled back: those past its end are the first.
            begin, end = (min(i * window[0], high) + shift[0] % high for i in stripe)
            if end <= high:
                run(image[begin:end], result[begin:end], stripe)
                continue
            pieces = [slice(begin, high), slice(max(begin - high, 0), end - high)]
            rows = torch.cat([image[piece] for piece in pieces])
            both = native.empty(rows.shape, steps.stream)
            run(rows, both, stripe)
            sizes = [max(high - begin, 0), end - max(begin, high)]
            for piece, part in zip(pieces, both.split(sizes), strict=True):
                result[piece] = part
    return out


def _mlp_half(steps: _Steps, x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = native.empty(rows.shape, steps.stream)
    for part, result in _rows.in_chunks(rows, out):
        steps.mlp_half(part, result)
    return out.view(x.shape)


def _terms(attn: Attention, windows: Windows) -> window_op.Terms:
    read = (attn.table, attn.qkv[0].bias, attn.logit_scale)
    CACHE.note(*(t for t in read if t is not None))
    dim = attn.proj.weight.shape[1] // attn.heads
    return window_op.terms(attn.heads, dim, attn.table, attn.padding(windows), attn.logit_scale)


class _Steps:
    """The steps of a block that work row by row, ready to run on any of `rows` rows.

    half: "attention" or "mlp", if it is only that one, else "".
    """

    def __init__(
        self,
        plan: TransformerBlock,
        rows: int,
        operand: torch.dtype,
        stream: torch.dtype,
        windows: Windows | None,
        half: str,
    ) -> None:
        attn = plan.attn
        self.plan, self.windows, self.half = plan, windows, half
        self.operand, self.stream = operand, stream
        if half != "mlp":
            self._qkv = [_rows.linear(linear, rows, operand) for linear in attn.qkv]
            self._proj = _rows.linear(attn.proj, rows, operand)
        if half != "attention":
            self._mlp = _rows.mlp(plan.mlp, rows, operand)
        if windows is not None:
            self.terms = _terms(attn, windows)

    def project(self, x: torch.Tensor) -> list[torch.Tensor]:
        """norm1 and the projection(s) to q, k and v: [rows, 3 A], or three of [rows, A]."""
        if len(x) <= _rows.WHOLE_ROWS:
            part = self._to_qkv(x)
            return [layer(part) for layer in self._qkv]
        sizes = [linear.weight.shape[0] for linear in self.plan.attn.qkv]
        results = [native.empty((len(x), size), self.operand) for size in sizes]
        for rows, *parts in _rows.in_chunks(x, *results):
            part = self._to_qkv(rows)
            for layer, result in zip(self._qkv, parts, strict=True):
                layer.into(part, result)
        return results

    def _to_qkv(self, x: torch.Tensor) -> torch.Tensor:
        if not self.plan.norms_last:
            return self._normed(x, self.plan.norm1)
        return x.to(self.operand)

    def finish(self, x: torch.Tensor, attended: torch.Tensor, out: torch.Tensor) -> None:
        """Everything after the attention, as far as it goes, into `out` [rows, C]."""
        norm = self.plan.attn.norm
        finish = self._norm_last if self.plan.norms_last else self._norm_first
        for before, part, after in _rows.in_chunks(x, attended, out):
            if norm is not None:
                _rows.normalise(part, norm, part)
            finish(before, part, after)

    def _norm_first(self, x: torch.Tensor, attended: torch.Tensor, out: torch.Tensor) -> None:
        plan = self.plan
        if self.half:
            self._proj.add_to(x, plan.gamma1, attended, out)
            return
        part = norm_op.forward(
            norm_op.KINDS[plan.norm2.kind],
            x,
            branch=self._proj(attended),
            gamma=plan.gamma1,
            weight=plan.norm2.weight,
            bias=plan.norm2.bias,
            eps=plan.norm2.eps,
            residual_out=out,
            normed_out=native.empty(x.shape, self.operand),
        )[1]
        self._mlp.add_to(out, plan.gamma2, self._hidden(part), out)

    def mlp_half(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """x + gamma2 * mlp(norm2(x)), or x + norm2(mlp(x)), into `out`."""
        if self.plan.norms_last:
            branch = self._mlp(self._hidden(x.to(self.operand)))
            _rows.add_normed(x, branch, self.plan.norm2, out)
            return
        part = self._normed(x, self.plan.norm2)
        self._mlp.add_to(x, self.plan.gamma2, self._hidden(part), out)

    def _normed(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        return _rows.normalise(x, norm, native.empty(x.shape, self.operand))

    def _norm_last(self, x: torch.Tensor, attended: torch.Tensor, out: torch.Tensor) -> None:
        _rows.add_normed(x, self._proj(attended), self.plan.norm1, out)
        if not self.half:
            self.mlp_half(out, out)

    def _hidden(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        hidden, norm = self._mlp.hidden(x), self.plan.mlp.norm
        if norm is not None:
            _rows.normalise(hidden[0], norm, hidden[0])
        return hidden
