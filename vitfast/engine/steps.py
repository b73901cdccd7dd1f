"""The parts of a transformer block that work row by row, prepared once for many rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vitfast.engine import checks, donation
from vitfast.engine import rows as by_rows
from vitfast.engine.products.linear import prepare_linear, prepare_mlp
from vitfast.engine.products.weights import CACHE
from vitfast.ops.common import norm as norm_op
from vitfast.ops.window_attention import native as window_op
from vitfast.plans import Attention, Norm, TransformerBlock, Windows
from vitfast.runtime import native


def prepare_block(
    x: torch.Tensor,
    plan: TransformerBlock,
    autocast: torch.dtype | None,
    windows: Windows | None,
    half: str,
) -> PreparedBlock | None:
    if half != "mlp":
        attn = plan.attn.computed()
        if attn is not plan.attn:
            CACHE.note(*plan.attn.qkv[0].bias.tensors)
            plan = plan._replace(attn=attn)
    operand = autocast or x.dtype
    stream = checks.stream_dtype(x, plan, operand, half)
    if stream is None or not checks.block(x, plan, autocast, windows, half):
        return None
    return PreparedBlock(plan, by_rows.count(x), operand, stream, windows, half)


def _terms(attn: Attention, windows: Windows) -> window_op.Terms:
    read = (attn.table, attn.qkv[0].bias, attn.logit_scale)
    CACHE.note(*(t for t in read if t is not None))
    dim = attn.proj.weight.shape[1] // attn.heads
    return window_op.terms(attn.heads, dim, attn.table, attn.padding(windows), attn.logit_scale)


class PreparedBlock:
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
            self._qkv = [prepare_linear(linear, rows, operand) for linear in attn.qkv]
            self._proj = prepare_linear(attn.proj, rows, operand)
        if half != "attention":
            self._mlp = prepare_mlp(plan.mlp, rows, operand)
        if windows is not None:
            self.terms = _terms(attn, windows)

    def room(self, x: torch.Tensor) -> torch.Tensor:
        """Where the result for x goes: a tensor of its shape, in its memory if that was given."""
        if self.half:  # who computes the other may read x again
            return native.empty(x.shape, self.stream)
        return donation.result(x, x.shape, self.stream)

    def project(self, x: torch.Tensor) -> list[torch.Tensor]:
        """norm1 and the projection(s) to q, k and v: [rows, 3 A], or three of [rows, A]."""
        if len(x) <= by_rows.WHOLE_ROWS:
            part = self._to_qkv(x)
            return [layer(part) for layer in self._qkv]
        sizes = [linear.weight.shape[0] for linear in self.plan.attn.qkv]
        results = [native.empty((len(x), size), self.operand) for size in sizes]
        for rows, *parts in by_rows.in_chunks(x, *results):
            part = self._to_qkv(rows)
            for layer, result in zip(self._qkv, parts, strict=True):
                layer.into(part, result)
        return results

    def _to_qkv(self, x: torch.Tensor) -> torch.Tensor:
        if not self.plan.norms_last:
            return self._normed(x, self.plan.norm1)
        return x.to(self.operand)

    def finish(self, x: torch.Tensor, attended: torch.Tensor, out: torch.Tensor) -> None:
        """Everything after the attention, as far as it goes, into `out` [rows, C], which may be x.

        Args:
            attended: [rows, A], in rows of any stride.
        """
        norm = self.plan.attn.norm
        finish = self._norm_last if self.plan.norms_last else self._norm_first
        for before, part, after in by_rows.in_chunks(x, attended, out):
            if norm is not None:
                by_rows.normalise(part, norm, part)
            finish(before, part, after)

    def _norm_first(self, x: torch.Tensor, attended: torch.Tensor, out: torch.Tensor) -> None:
        plan = self.plan
        if self.half:
            self._proj.add_to(x, plan.gamma1, attended, out)
            return
        part = native.empty(x.shape, self.operand)
        norm_op.forward(
            norm_op.KINDS[plan.norm2.kind],
            x,
            branch=self._proj(attended),
            gamma=plan.gamma1,
            weight=plan.norm2.weight,
            bias=plan.norm2.bias,
            eps=plan.norm2.eps,
            residual_out=out,
            normed_out=part,
        )
        self._mlp.add_to(out, plan.gamma2, self._hidden(part), out)

    def mlp_half(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """x + gamma2 * mlp(norm2(x)), or x + norm2(mlp(x)), into `out`."""
        if self.plan.norms_last:
            branch = self._mlp(self._hidden(x.to(self.operand)))
            by_rows.add_normed(x, branch, self.plan.norm2, out)
            return
        part = self._normed(x, self.plan.norm2)
        self._mlp.add_to(x, self.plan.gamma2, self._hidden(part), out)

    def _normed(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        return by_rows.normalise(x, norm, native.empty(x.shape, self.operand))

    def _norm_last(self, x: torch.Tensor, attended: torch.Tensor, out: torch.Tensor) -> None:
        by_rows.add_normed(x, self._proj(attended), self.plan.norm1, out)
        if not self.half:
            self.mlp_half(out, out)

    def _hidden(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        hidden, norm = self._mlp.hidden(x), self.plan.mlp.norm
        if norm is not None:
            by_rows.normalise(hidden[0], norm, hidden[0])
        return hidden
