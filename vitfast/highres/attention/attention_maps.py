"""What a model's tokens attend to, without a matrix of all tokens by all tokens.

A row of an attention is softmax(q k^T scale + bias) for one query: one vector q, and k of all
tokens. So the map of a query costs O(N) where a dense attention matrix costs O(N^2), and the model
itself goes on running its fused attention, which gives no matrix at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import nn

from vitfast.errors import InputValueError
from vitfast.highres.attention import window_maps
from vitfast.highres.attention.queries import (
    Queries,
    checked_indices,
    chosen_heads,
    chosen_sites,
    query_tokens,
)
from vitfast.highres.attention.queries_keys import QueriesKeys, read
from vitfast.highres.attention.rows import averaged_row, rows
from vitfast.highres.attention.sites import POOL, Site, grid_of, watch
from vitfast.highres.pictures import as_images
from vitfast.layers.reading.children import timm_class


@dataclass(frozen=True)
class AttentionMap:
    """From each of Q queries to every token of an image, float32 (float64 of a float64 model).

    Args:
        patches: [B, heads, Q, rows, columns], attention to the patches. `heads` is 1 where one head
            or the mean was asked for.
        prefix: [B, heads, Q, P], attention to the tokens before the patches in the model's order:
            class, distillation, registers. P may be 0. `patches` and `prefix` of a query sum to 1
            together (but for the padding of a window, which is in neither).
        layer: the number of the block, from 0; "pool"; or "rollout".
    """

    patches: torch.Tensor
    prefix: torch.Tensor
    layer: int | str

    def upsampled(self, size: tuple[int, int], mode: str = "bilinear") -> torch.Tensor:
        """`patches` at another size, [B, heads, Q, height, width], to lay over an image.

        Args:
            size: height and width.
            mode: as of torch.nn.functional.interpolate: "bilinear", "nearest", "bicubic".

        Raises:
            InputValueError: no size of two positive integers, or a mode that torch does not know.
        """
        fits = isinstance(size, (tuple, list)) and len(size) == 2
        if not fits or any(type(n) is not int or n < 1 for n in size):
            raise InputValueError(f"size {size!r}: expected height and width")
        how: dict[str, Any] = (
            {} if mode in ("nearest", "nearest-exact", "area") else {"align_corners": False}
        )
        try:
            found = F.interpolate(self.patches.flatten(1, 2), size, mode=mode, **how)
        except (NotImplementedError, ValueError) as error:
            raise InputValueError(f"mode {mode!r}: {error}") from error
        return found.unflatten(1, self.patches.shape[1:3])


@overload
def attention_map(
    model: nn.Module,
    image: Any,
    layer: int | Literal["pool"] = -1,
    query: Queries = "cls",
    head: int | str = "mean",
) -> AttentionMap: ...
@overload
def attention_map(
    model: nn.Module,
    image: Any,
    layer: Sequence[int] | Literal["all"],
    query: Queries = "cls",
    head: int | str = "mean",
) -> list[AttentionMap]: ...
def attention_map(
    model: nn.Module,
    image: Any,
    layer: int | str | Sequence[int] = -1,
    query: Queries = "cls",
    head: int | str = "mean",
) -> AttentionMap | list[AttentionMap]:
    """What some tokens attend to in some layers of a model, in O(N) time and memory per query.

        found = vitfast.highres.attention_map(model, image)
        overlay = found.upsampled((height, width))[0, 0, 0]

    The model runs its own forward, swapped or not, up to the last layer that is asked for; then q
    of the queries and k of all tokens are computed as timm computes them, with q/k norm, rotary
    embedding, position bias and masks, in the model's dtype (and under the caller's autocast), and
    their softmax in float32. The run is that of evaluation mode, without autograd. The model is
    left as it was: no hook stays, and `fused_attn`, training mode and what is cached do not change.
    Of a model that torch.compile made, the plain forward is run.

    Known are timm's Attention, AttentionRope, EvaAttention, BEiT's and RelPosAttention, in any
    block, ParallelScalingBlock, AttentionPoolLatent, and the window attention of Swin and Swin V2,
    or vitfast's drop-ins for them: ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP, EVA-02, BEiT,
    Perception Encoder, NaFlexViT, ViTs with relative positions, hybrids. A model with another
    attention, such as MaxViT or Hiera, is refused.

    Memory, beyond the model's own: k of 2,048 tokens at a time and the map; k of all tokens and 32
    MB of scores where there are so many queries that their scores need more than that at once.

    Args:
        model: a timm model, or a module that holds one and takes images.
        image: a tensor [3, H, W] or [B, 3, H, W] of floats as the model takes them, normalised; or
            a picture: a path, a PIL image, or uint8 [H, W, 3] as NumPy array or [3, H, W] as
            tensor. Pictures are resized to the model's own size, all of them without a crop, and
            normalised as its pretrained_cfg says.
        layer: number of a block, -1 is the last; a list of them, or "all"; or "pool" for the
            attention that pools the tokens of SigLIP and the like, whose queries are its latents.
        query: "cls", "dist" (of distilled models) or "registers"; the index of a token, the prefix
            tokens counted first, or a list or tensor [Q] of them; a patch as a tuple (row, column),
            or a list of such tuples or a tensor [Q, 2]; or "mean", the average over all patches,
            which takes O(N^2) time but no more memory. Of windows: patches only, each of which
            attends within its window, and 0 to all else. Of "pool": indices of latents; all of them
            by default.
        head: "mean" over the heads, "each", or the number of one.

    Returns:
        An AttentionMap; a list of them in the order of the layers where `layer` is a list or "all".

    Raises:
        InputValueError: a layer, query, head or picture that there is not, or an image that the
            model cannot take.
        InputTypeError: an argument of another type.
        UnsupportedInputError: an attention that is not known.
    """
    images = as_images(model, image)
    sites, numbers = chosen_sites(model, layer)
    found: dict[int, AttentionMap] = {}
    by_site = {id(site): number for site, number in zip(sites, numbers, strict=True)}

    def look(site: Site, x: torch.Tensor, given: dict[str, Any]) -> None:
        number = by_site[id(site)]
        label = "pool" if timm_class(site.attn) is POOL else number
        if site.windowed:
            to = window_maps.maps(site, x, query)
            patches = chosen_heads(head, to.shape[1])(to)
            found[number] = AttentionMap(patches, patches.new_zeros((*patches.shape[:3], 0)), label)
            return
        grid = grid_of(site, images, x)
        qk = read(site, x, given)
        tensor = weigh(site, qk, grid, query, head)
        found[number] = split_prefix(tensor, grid, label)

    watch(model, images, sites, look)
    result = [found[number] for number in numbers]
    return result if isinstance(layer, (list, tuple)) or layer == "all" else result[0]


def split_prefix(to: torch.Tensor, grid: tuple[int, int, int], label: int | str) -> AttentionMap:
    """Attention to all tokens [B, heads, Q, N] as a map."""
    prefix, rows_, columns = grid
    patches = to[..., prefix:].unflatten(-1, (rows_, columns))
    return AttentionMap(patches, to[..., :prefix], label)


def weigh(
    site: Site, qk: QueriesKeys, grid: tuple[int, int, int], query: Queries, head: int | str
) -> torch.Tensor:
    """[B, heads, Q, N] for the queries that `query` means."""
    pick = chosen_heads(head, site.attn.num_heads)  # type: ignore[arg-type]
    if timm_class(site.attn) is POOL:
        latents = int(site.attn.latent_len)  # type: ignore[arg-type]
        every = isinstance(query, str) and query == "cls"
        chosen = list(range(latents)) if every else checked_indices(query, latents)
        return rows(qk, torch.tensor(chosen, device=qk.device), pick)
    if isinstance(query, str) and query == "mean":
        prefix = grid[0]
        return averaged_row(qk, torch.arange(prefix, qk.tokens, device=qk.device), pick)
    return rows(qk, query_tokens(site, grid, query, qk.device), pick)
