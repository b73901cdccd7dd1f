"""Attention rollout of single tokens: vector-matrix products from the last layer to the first."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitfast.errors import InputValueError, UnsupportedInputError
from vitfast.highres.attention.attention_maps import AttentionMap, split_prefix
from vitfast.highres.attention.queries import Queries, query_tokens
from vitfast.highres.attention.queries_keys import read
from vitfast.highres.attention.rows import mean_head_sum
from vitfast.highres.attention.sites import Site, find_sites, grid_of, watch
from vitfast.highres.pictures import as_images


def attention_rollout(
    model: nn.Module, image: Any, query: Queries = "cls", residual: float = 0.5
) -> AttentionMap:
    """What some tokens gather from the image through all layers together.

    With A_l the mean over heads of layer l's attention and I the residual connection, rollout is
    the product of (1 - residual) A_l + residual I over all layers (Abnar and Zuidema, 2020,
    "Quantifying Attention Flow in Transformers"). Of that product only the rows of the queries are
    computed, as a vector that is multiplied by one layer after the other from the last to the
    first. No N x N matrix exists at any time.

    Memory: the inputs of all blocks, layers * B * N * C elements in the model's dtype, since they
    come from the first to the last; k of one layer, and 32 MB of scores. Time: about as much as the
    attention of the forward itself, in float32.

    Args:
        model, image, query: as of `attention_map`; but a query is not "mean".
        residual: the share of the residual connection, from 0 up to but not including 1.

    Returns:
        An AttentionMap of one head, whose `layer` is "rollout".

    Raises:
        InputValueError, InputTypeError: as `attention_map`.
        UnsupportedInputError: as `attention_map`; also for windows, and where layers have different
            tokens.
    """
    if (
        isinstance(residual, bool)
        or not isinstance(residual, (int, float))
        or not 0 <= residual < 1
    ):
        raise InputValueError(
            f"residual {residual!r}: expected a share from 0 up to, not including, 1"
        )
    images = as_images(model, image)
    sites = find_sites(model)
    if any(site.windowed for site in sites):
        raise UnsupportedInputError(
            f"{type(model).__name__} attends within windows, of which there is no rollout"
        )
    inputs: list[tuple[Site, torch.Tensor, dict[str, Any]]] = []
    grids = set()

    def keep(site: Site, x: torch.Tensor, given: dict[str, Any]) -> None:
        grids.add(grid_of(site, images, x))
        if len(grids) > 1:
            raise UnsupportedInputError("the layers have different tokens: there is no rollout")
        inputs.append((site, x, given))

    watch(model, images, sites, keep)
    (grid,) = grids
    site, x, _ = inputs[-1]
    index = query_tokens(site, grid, query, x.device)
    dtype = torch.promote_types(x.dtype, torch.float32)
    flow = torch.zeros(len(x), len(index), x.shape[1], device=x.device, dtype=dtype)
    flow[:, torch.arange(len(index), device=x.device), index] = 1
    with torch.no_grad():
        while inputs:
            site, x, given = inputs.pop()
            flow = (1 - residual) * mean_head_sum(read(site, x, given), flow) + residual * flow
    return split_prefix(flow[:, None], grid, "rollout")
