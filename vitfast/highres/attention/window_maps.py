"""Maps of Swin's and Swin V2's windows: what a patch attends to within the window it lies in."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import swin_transformer_v2

from vitfast.errors import InputValueError, UnsupportedInputError
from vitfast.highres.attention.queries import Queries, checked_patches, patch_pairs
from vitfast.highres.attention.queries_keys import projection_of
from vitfast.highres.attention.rows import softmax_
from vitfast.highres.attention.sites import Site
from vitfast.layers.reading.attention import check_softmax
from vitfast.layers.reading.children import timm_class
from vitfast.plans import Unfit


def maps(site: Site, x: torch.Tensor, query: Queries) -> torch.Tensor:
    """Attention of patches to the map x [B, rows, columns, C] of a block, [B, heads, Q, rows,
    columns]: zero outside of their windows.

    Windows are cut as timm cuts them: the map is shifted round, then padded at its end with zeros,
    which get attention as tokens do.

    Raises:
        InputValueError: the queries are no patches of this map.
        UnsupportedInputError: the softmax was replaced.
    """
    pairs = patch_pairs(query)
    if pairs is None:
        raise InputValueError(f"query {query!r}: of windows, name patches as (row, column)")
    attn: Any = site.attn
    try:
        check_softmax(attn._modules)
    except Unfit as reason:
        raise UnsupportedInputError(f"{site.name}: {reason}") from reason
    block: Any = site.watched
    y = x if site.norm is None else site.norm(x)
    bias, mask = _bias(attn), _mask(block, x)
    size = (x.shape[1], x.shape[2])
    found = []
    for row, column in checked_patches(pairs, size):
        window, token, places = _window(block, size, (row, column))
        inside = [n for n, place in enumerate(places) if place is not None]
        rows = torch.tensor([p[0] for p in places if p is not None], device=x.device)
        columns = torch.tensor([p[1] for p in places if p is not None], device=x.device)
        tokens = y.new_zeros(len(x), len(places), y.shape[-1])
        tokens[:, inside] = y[:, rows, columns]
        scores = _scores(attn, tokens, token) + bias[:, token]
        if mask is not None:
            scores = scores + mask[window, token]
        weights = softmax_(scores)
        whole = weights.new_zeros(len(x), weights.shape[1], *size)
        whole[:, :, rows, columns] = weights[..., inside]
        found.append(whole)
    return torch.stack(found, 2)


Place = tuple[int, int]


def _window(block: Any, size: Place, patch: Place) -> tuple[int, int, list[Place | None]]:
    """The number of a patch's window, the patch's own in it, and where the window's tokens lie in
    the map; None for padding."""
    axes, numbers, own = [], [], []
    for length, width, shift, at in zip(
        size, block.window_size, block.shift_size, patch, strict=True
    ):
        shifted = (at - shift) % length
        start = shifted - shifted % width
        axes.append(
            [(n + shift) % length if n < length else None for n in range(start, start + width)]
        )
        numbers.append(start // width)
        own.append(shifted % width)
    across = -(-size[1] // block.window_size[1])
    places = [
        None if row is None or column is None else (row, column)
        for row in axes[0]
        for column in axes[1]
    ]
    return numbers[0] * across + numbers[1], own[0] * block.window_size[1] + own[1], places


def _scores(attn: Any, tokens: torch.Tensor, token: int) -> torch.Tensor:
    """q of one token of a window [B, A, C] times k of all, scaled: [B, heads, A]."""
    q, k = (
        t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        for t in projection_of(attn).whole(tokens)
    )
    q = q[:, :, token : token + 1]
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        if timm_class(attn) is swin_transformer_v2.WindowAttention:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            q = q.to(wide) * attn.logit_scale.to(wide).clamp(max=math.log(100.0)).exp()
        else:
            q = q.to(wide) * (q.shape[-1] ** -0.5 if attn.fused_attn else attn.scale)
        return (q @ k.to(wide).transpose(-2, -1))[:, :, 0]


def _bias(attn: Any) -> torch.Tensor:
    """By relative position, [heads, A, A]."""
    if timm_class(attn) is swin_transformer_v2.WindowAttention:
        table = attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads)
        table = 16 * torch.sigmoid(table)
    else:
        table = attn.relative_position_bias_table
    return table[attn.relative_position_index].permute(2, 0, 1)


def _mask(block: Any, x: torch.Tensor) -> torch.Tensor | None:
    """That keeps apart what the shift brought together, [windows, A, A]."""
    if not block.dynamic_mask:
        return block.attn_mask
    padded = [-(-n // w) * w for n, w in zip(x.shape[1:3], block.window_size, strict=True)]
    return block.get_attn_mask(x.new_zeros(()).expand(1, *padded, 1))
