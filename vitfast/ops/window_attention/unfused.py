"""Windowed attention in torch ops, forward and backward: what runs where no kernel takes a call.

It computes what `reference.window_attention` defines, with less of everything around the products.
Shift, padding, partition and the order of memory that batched products want are one gather of qkv
by a table of places, and their inverse is another: two passes over a tensor of 3 C channels. timm
rolls and cuts x, of C channels, before its qkv layer; here qkv is what comes in, and one copy of it
is what a batched product needs anyway. Gradients come from explicit products. Nothing adds up in an
order that is left to chance.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from vitfast.ops.common.autodiff import gradients
from vitfast.ops.window_attention.reference import (
    INPUTS,
    LARGEST_SCALE,
    MASKED,
    BackwardCall,
    Call,
    band_map,
    factors,
    partition,
    relative_index,
    unit,
    windowed,
)


class _Places(NamedTuple):
    """Where the tokens of the map lie in the windows, whose places are numbered through.

    Args:
        token: [windows * N], the number in the map of the token in each place, any in a padding's.
        place: [H * W], the place of each token.
        padding: [windows * N - H * W], the places that padding fills.
    """

    token: torch.Tensor
    place: torch.Tensor
    padding: torch.Tensor


def _places(call: Call) -> _Places:
    high, wide = call.qkv.shape[1:3]
    tokens = high * wide
    numbers = torch.arange(tokens, device=call.qkv.device).view(1, high, wide, 1, 1, 1)
    beyond = numbers.new_full((1, 1, 1), tokens)
    token = windowed(numbers, call, beyond).flatten()
    by_token = token.argsort(stable=True)
    return _Places(token.clamp_(max=tokens - 1), by_token[:tokens], by_token[tokens:])


def _gather(x: torch.Tensor, places: _Places, pad: torch.Tensor | None) -> torch.Tensor:
    """[B, H, W, parts, heads, D] as [parts, B, heads, windows * N, D], contiguous.

    Args:
        pad: [parts, heads, D], what stands in the padding; zeros by default.
    """
    tokens = x.permute(3, 0, 4, 1, 2, 5).flatten(3, 4)
    found = tokens.index_select(3, places.token)
    if places.padding.numel():
        if pad is None:
            found.index_fill_(3, places.padding, 0)
        else:
            parts, batch, heads, _, dim = found.shape
            token = pad.to(x.dtype).view(parts, 1, heads, 1, dim)
            token = token.expand(-1, batch, -1, places.padding.numel(), -1)
            found.index_copy_(3, places.padding, token)
    return found


def _by_window(x: torch.Tensor, call: Call) -> torch.Tensor:
    """[B, heads, windows * N, D] as [B * heads * windows, N, D], a view."""
    return x.view(-1, call.wh * call.ww, x.shape[-1])


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a b of [batch, M, K] and [batch, K, N], summed and returned in a dtype as wide or wider."""
    if a.dtype != dtype and a.is_cuda and not torch.version.hip:
        return torch.bmm(a, b, out_dtype=dtype)
    return torch.bmm(a.to(dtype), b.to(dtype))


def _scale(call: Call, dtype: torch.dtype) -> torch.Tensor:
    """What scores [B, heads, windows, N, N] are multiplied by, [heads, 1, 1, 1]."""
    heads, dim = call.qkv.shape[4:]
    found = factors(call.logit_scale, heads, dim, call.scale, dtype, call.qkv.device)
    return found.view(heads, 1, 1, 1)


def _weights(
    call: Call, q: torch.Tensor, k: torch.Tensor, keep: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """softmax of the scores [B, heads, windows, N, N], float32 or float64; products if asked for.

    Args:
        q, k: [B * heads * windows, N, D].
        keep: return q k^T, before its factor, too.
    """
    batch, heads = call.qkv.shape[0], call.qkv.shape[4]
    dtype = torch.promote_types(q.dtype, torch.float32)
    products = _product(q, k.mT, dtype)
    products = products.view(batch, heads, -1, *products.shape[1:])
    factor = _scale(call, dtype)
    scores = products * factor if keep else products.mul_(factor)
    if call.table is not None:
        bias = call.table.to(dtype)[relative_index(call.window, q.device)]
        scores += bias.permute(2, 0, 1)[:, None]
    if any(call.shift):
        bands = band_map(call.padded, call.window, call.shift, q.device)
        bands = bands.view(1, *call.padded, 1, 1, 1)
        bands = partition(bands, call.window)[0, :, 0, :, 0, 0]  # [windows, N]
        scores += MASKED * (bands[:, :, None] != bands[:, None, :]).to(dtype)
    return scores.softmax(-1), products if keep else None


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The result [B, H, W, heads, D], and statistics that say that none were saved."""
    batch, high, wide, _, heads, dim = call.qkv.shape
    places = _places(call)
    dtype = torch.promote_types(call.qkv.dtype, torch.float32)
    q, k, v = (_by_window(t, call) for t in _gather(call.qkv, places, call.pad))
    if call.logit_scale is not None:
        q, k = unit(q, dtype), unit(k, dtype)
    weights, _ = _weights(call, q, k)
    out = weights.to(v.dtype).flatten(0, 2) @ v
    out = out.view(batch, heads, -1, dim).transpose(1, 2).index_select(1, places.place)
    # Sums of -1 tell another backend's backward that there are none.
    stats = call.qkv.new_full(call.stats_shape, -1.0, dtype=dtype)
    return out.view(batch, high, wide, heads, dim), stats


def backward(call: BackwardCall) -> tuple[torch.Tensor, ...]:
    """Gradients of `INPUTS`, empty where not wanted.

    The scores are made again, one product beside the four of the gradients, rather than the weights
    kept, which are N numbers a token and head: more than q, k and v in a window of 97 tokens and
    more at D = 32.
    """
    given = call.forward
    batch, high, wide, _, heads, dim = call.qkv.shape
    dtype = torch.promote_types(call.qkv.dtype, torch.float32)
    places = _places(given)
    qkv = _gather(call.qkv, places, call.pad)
    grad = _by_window(_gather(call.grad[:, :, :, None], places, None)[0], given)
    q, k, v = (_by_window(t, given) for t in qkv)
    if call.logit_scale is not None:
        q, k = unit(q, dtype), unit(k, dtype)
    of_qkv, of_table, of_pad, of_scale = call.wanted
    weights, products = _weights(given, q, k, keep=of_scale)

    dscores = _product(grad, v.mT, dtype).view_as(weights)
    dscores -= (weights * dscores).sum(-1, keepdim=True)
    dscores *= weights
    found = {}
    if of_table and call.table is not None:
        dtable = sums_by_position(dscores.sum((0, 2)), given.window)
        found["table"] = dtable.to(call.table.dtype)
    if of_scale and call.logit_scale is not None and products is not None:
        scale = call.logit_scale.to(dtype)
        summed = (dscores * products).sum((0, 2, 3, 4))
        summed *= scale.clamp(max=LARGEST_SCALE).exp() * (scale <= LARGEST_SCALE)
        found["logit_scale"] = summed.to(call.logit_scale.dtype)
    del products
    if of_qkv or of_pad:
        dqkv = torch.empty_like(qkv)
        dq, dk, dv = (_by_window(t, given) for t in dqkv)
        torch.bmm(weights.to(v.dtype).flatten(0, 2).mT, grad, out=dv)
        narrow = dscores.mul_(_scale(given, dtype)).to(q.dtype).flatten(0, 2)
        torch.bmm(narrow, k, out=dq)
        torch.bmm(narrow.mT, q, out=dk)
        if call.logit_scale is not None:
            dqkv[:2] = gradients(lambda t: unit(t, dtype), (qkv[:2],), (dqkv[:2],))[0]
        if of_pad and call.pad is not None:
            dpad = dqkv.index_select(3, places.padding).sum((1, 3), dtype=dtype)
            found["pad"] = dpad.to(call.pad.dtype)
        if of_qkv:
            by_token = dqkv.permute(1, 3, 0, 2, 4).index_select(1, places.place)
            found["qkv"] = by_token.view(batch, high, wide, 3, heads, dim)
    return tuple(found[n] if n in found else call.qkv.new_empty(0) for n in INPUTS)


def sums_by_position(x: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """[(2 h - 1)(2 w - 1), heads]: sums of x [heads, N, N] over pairs in one relative position.

    The transpose of `table[relative_index(window)]`, in an order that does not depend on chance.
    """
    h, w = window
    pairs = x.view(-1, h, w, h, w).transpose(2, 3)
    columns = _sums_by_difference(pairs)  # [heads, h, h, 2 w - 1]
    rows = _sums_by_difference(columns.permute(0, 3, 1, 2))  # [heads, 2 w - 1, 2 h - 1]
    return rows.permute(2, 1, 0).reshape(-1, x.shape[0])


def _sums_by_difference(x: torch.Tensor) -> torch.Tensor:
    """[..., n, n] to [..., 2 n - 1]: at i - j + n - 1, the sum of all x[..., i, j]."""
    n = x.shape[-1]
    # Rows of 2 n numbers, the last n of them 0, read as rows of 2 n - 1: each one further right.
    rows = F.pad(x.flip(-1), (0, n)).flatten(-2)[..., : n * (2 * n - 1)]
    return rows.unflatten(-1, (n, 2 * n - 1)).sum(-2)
