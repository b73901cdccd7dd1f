"""Rows of an attention matrix, and weighted sums of its rows, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vitfast.highres.attention.queries_keys import TOKENS, QueriesKeys

SCORES = 32 * 2**20
"""Bytes of scores that exist at a time, beyond the result."""
QUERIES = 256
"""Queries whose q exist at a time, in sums over many."""

Pick = Callable[[torch.Tensor], torch.Tensor]
"""Makes the heads that are asked for of all of them, [B, heads, ...]."""


def softmax_(scores: torch.Tensor) -> torch.Tensor:
    """Over the last dimension, in the memory of the scores."""
    scores -= scores.amax(-1, keepdim=True)
    scores.exp_()
    scores /= scores.sum(-1, keepdim=True)
    return scores


def rows(qk: QueriesKeys, index: torch.Tensor, pick: Pick) -> torch.Tensor:
    """The rows of these tokens [Q], as [B, heads, Q, N]."""
    q = qk.queries(index)
    batch, heads, _, _ = q.shape
    at_once = max(1, SCORES // (4 * batch * heads * qk.tokens))
    every = qk.every_key() if at_once < len(index) else None
    found = []
    for start in range(0, len(index), at_once):
        of = index[start : start + at_once]
        part = q[:, :, start : start + at_once]
        scores: list[torch.Tensor] = []
        for first in range(0, qk.tokens, TOKENS):
            last = min(first + TOKENS, qk.tokens)
            to = torch.arange(first, last, device=qk.device)
            k = qk.keys(to) if every is None else every[:, :, first:last]
            scores.append(qk.scores(part, k, of, to))
        found.append(pick(softmax_(torch.cat(scores, -1))))
    return torch.cat(found, 2)


def averaged_row(qk: QueriesKeys, index: torch.Tensor, pick: Pick) -> torch.Tensor:
    """The mean of the rows of these tokens, as [B, heads, 1, N]."""
    weights = torch.zeros(1, 1, qk.tokens, device=qk.device)
    weights[..., index] = 1
    return pick(torch.stack(_sums(qk, weights), 1) / len(index))


def mean_head_sum(qk: QueriesKeys, weights: torch.Tensor) -> torch.Tensor:
    """weights [B, R, N] times the mean over heads of the attention [B, N, N], as [B, R, N].

    Rows of weight 0 are not computed.
    """
    total, heads = None, 0
    for part in _sums(qk, weights):
        total, heads = part if total is None else total + part, heads + 1
    assert total is not None
    return total / heads


def _sums(qk: QueriesKeys, weights: torch.Tensor) -> list[torch.Tensor]:
    """weights [B or 1, R, N] times the attention of each head, [B, R, N] each."""
    index = weights.flatten(0, 1).ne(0).any(0).nonzero().flatten()
    k, every = qk.every_key(), torch.arange(qk.tokens, device=qk.device)
    sums: list[torch.Tensor] = [k.new_empty(0)] * k.shape[1]
    at_once = max(1, min(QUERIES, SCORES // (4 * len(k) * qk.tokens)))
    for start in range(0, len(index), at_once):
        of = index[start : start + at_once]
        q = qk.queries(of)
        for head in range(k.shape[1]):
            one = slice(head, head + 1)
            scores = qk.scores(q[:, one], k[:, one], of, every, head)
            part = weights[..., of].to(scores.dtype) @ softmax_(scores)[:, 0]
            sums[head] = part if start == 0 else sums[head].add_(part)
            del scores  # before the next ones are made
    return sums
