"""What callers mean by a query, a layer and a head."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from vitfast.errors import InputTypeError, InputValueError
from vitfast.highres.attention.sites import Site, find_pool, find_sites

Queries = str | int | tuple[int, int] | Sequence[Any] | torch.Tensor


def query_tokens(
    site: Site, grid: tuple[int, int, int], query: Queries, device: torch.device
) -> torch.Tensor:
    """The indices [Q] of the tokens that `query` means.

    Raises:
        InputValueError, InputTypeError: it means none.
    """
    prefix, rows_, columns = grid
    if isinstance(query, str):
        return torch.tensor(_named_tokens(site, query), device=device)
    pairs = patch_pairs(query)
    if pairs is None:
        chosen = checked_indices(query, prefix + rows_ * columns)
    else:
        chosen = [prefix + r * columns + c for r, c in checked_patches(pairs, (rows_, columns))]
    return torch.tensor(chosen, device=device)


def _named_tokens(site: Site, name: str) -> list[int]:
    owner = site.owner
    parts = [owner, getattr(owner, "embeds", None)]

    def has(token: str) -> bool:
        return any(getattr(part, token, None) is not None for part in parts)

    start = int(has("cls_token"))
    if name == "cls":
        if start:
            return [0]
        raise InputValueError(
            'query "cls": the model has no class token; name patches as (row, column), or "mean"'
        )
    if name == "dist":
        if has("dist_token"):
            return [1]
        raise InputValueError('query "dist": the model has no distillation token')
    if name == "registers":
        if has("reg_token"):
            return list(range(start, owner.num_prefix_tokens))
        raise InputValueError('query "registers": the model has no registers')
    raise InputValueError(
        f'query {name!r}: expected "cls", "dist", "registers", "mean", indices or (row, column)'
    )


def _listed(query: Any) -> Any:
    """A tensor or array as lists; anything else as it is."""
    return query.tolist() if hasattr(query, "tolist") else query


def patch_pairs(query: Any) -> list[tuple[int, int]] | None:
    """The patches (row, column) that `query` names; None where it names none."""
    query = _listed(query)
    if isinstance(query, tuple) and len(query) == 2 and not isinstance(query[0], (tuple, list)):
        query = [query]
    if not isinstance(query, (list, tuple)) or not query or not isinstance(query[0], (tuple, list)):
        return None
    pairs = []
    for pair in query:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InputTypeError(f"query {pair!r}: expected (row, column), as the others")
        pairs.append((_integer(pair[0]), _integer(pair[1])))
    return pairs


def checked_patches(pairs: list[tuple[int, int]], size: tuple[int, int]) -> list[tuple[int, int]]:
    """The same patches, all of which are within the grid."""
    for row, column in pairs:
        if not (0 <= row < size[0] and 0 <= column < size[1]):
            raise InputValueError(f"query {(row, column)}: the patches are {size[0]} x {size[1]}")
    return pairs


def checked_indices(query: Any, tokens: int) -> list[int]:
    query = _listed(query)
    chosen = [_integer(n) for n in (query if isinstance(query, (list, tuple)) else [query])]
    if not chosen:
        raise InputValueError("query: no token is named")
    for n in chosen:
        if not 0 <= n < tokens:
            raise InputValueError(f"query {n}: there are {tokens} tokens, from 0 on")
    return chosen


def _integer(value: Any) -> int:
    if isinstance(value, (bool, str)):
        raise InputTypeError(f"query {value!r}: expected an integer")
    try:
        return operator.index(value)
    except TypeError:
        raise InputTypeError(f"query {value!r}: expected an integer") from None


def chosen_sites(model: nn.Module, layer: Any) -> tuple[list[Site], list[int]]:
    """The sites that `layer` names, each once, and the number of each in the order asked for."""
    if isinstance(layer, str) and layer == "pool":
        return [find_pool(model)], [0]
    sites = find_sites(model)
    if isinstance(layer, str):
        if layer != "all":
            raise InputValueError(f'layer {layer!r}: expected numbers, "all" or "pool"')
        return sites, list(range(len(sites)))
    asked = list(layer) if isinstance(layer, (list, tuple)) else [layer]
    numbers = []
    for n in asked:
        if isinstance(n, bool) or not hasattr(n, "__index__"):
            raise InputTypeError(f"layer {n!r}: expected an integer")
        if not -len(sites) <= n < len(sites):
            raise InputValueError(f"layer {n}: the model has {len(sites)}")
        numbers.append(int(n) % len(sites))
    if not numbers:
        raise InputValueError("layer: none is named")
    if len(set(numbers)) != len(numbers):
        raise InputValueError(f"layer {layer!r}: one is named twice")
    return [sites[n] for n in numbers], numbers


def chosen_heads(head: Any, count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """What makes the heads that are asked for of all of them, [B, heads, ...]."""
    if isinstance(head, str):
        if head == "mean":
            return lambda t: t.mean(1, keepdim=True)
        if head == "each":
            return lambda t: t
        raise InputValueError(f'head {head!r}: expected "mean", "each" or a number')
    if isinstance(head, bool) or not hasattr(head, "__index__"):
        raise InputTypeError(f"head {head!r}: expected an integer")
    if not -count <= head < count:
        raise InputValueError(f"head {head}: the layer has {count}")
    number = int(head) % count
    return lambda t: t[:, number : number + 1]
