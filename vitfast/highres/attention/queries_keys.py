"""q and k of one attention, for those of its tokens that are asked for, and what is added to q k.

Order and dtypes are those of timm's forwards: norm, projection, head split, q/k norm, rotary
embedding. Weights that are nothing but weights are read in part: the rows of q for the queries, the
rows of k for the keys, for some tokens at a time. A norm or a projection that is anything else
(LoRA, a quantised layer, one with hooks) is called once on all tokens, as timm calls it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm import layers as timm_layers
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models import beit
from timm.models import vision_transformer_relpos as relpos
from torch import nn

from vitfast.highres.attention.sites import PARALLEL, POOL, Site
from vitfast.layers.reading.children import check_bare, timm_class
from vitfast.plans import Unfit

TOKENS = 2048
"""Tokens of which k is computed at a time."""

_TOKENWISE = {
    nn.Identity,
    nn.LayerNorm,
    nn.Linear,
    timm_layers.LayerNorm,
    timm_layers.LayerNormFp32,
    timm_layers.RmsNorm,
    timm_layers.RmsNormFp32,
    timm_layers.SimpleNorm,
}
"""Modules that treat every token alike, whatever others come with it."""

Term = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(queries [Q], keys [n]) -> what is added to their scores, or a mask of bools."""


@dataclass
class QueriesKeys:
    """q and k of one attention.

    queries, keys: a function of token indices [n] that gives [B, heads, n, D]. tokens: N. scale:
    of q k^T. terms: what is added to the scores. causal: whether a token sees none after it.
    """

    queries: Callable[[torch.Tensor], torch.Tensor]
    keys: Callable[[torch.Tensor], torch.Tensor]
    tokens: int
    device: torch.device
    scale: float | None
    terms: list[Term] = field(default_factory=list)
    causal: bool = False

    def every_key(self) -> torch.Tensor:
        """k of all tokens, [B, heads, N, D]: as much memory as the block's input."""
        found: torch.Tensor | None = None
        for start in range(0, self.tokens, TOKENS):
            stop = min(start + TOKENS, self.tokens)
            part = self.keys(torch.arange(start, stop, device=self.device))
            if found is None:
                if stop == self.tokens:
                    return part
                found = part.new_empty((*part.shape[:2], self.tokens, part.shape[3]))
            found[:, :, start:stop] = part
        assert found is not None
        return found

    def scores(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        of: torch.Tensor,
        to: torch.Tensor,
        head: int | None = None,
    ) -> torch.Tensor:
        """Scores before the softmax, in float32 or more: of queries q, of tokens `of`, with keys k,
        of tokens `to`; [B, heads, Q, D] and [B, heads, n, D], of one head with `head`."""
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
            found = (q.to(wide) * scale) @ k.to(wide).transpose(-2, -1)
            for term in self.terms:
                part = term(of, to)
                if head is not None and part.ndim >= 3 and part.shape[-3] > 1:
                    part = part[..., head : head + 1, :, :]
                if part.dtype == torch.bool:
                    found.masked_fill_(~part, -math.inf)
                else:
                    found += part
            if self.causal:
                found.masked_fill_(of[:, None] < to, -math.inf)
        return found


def read(site: Site, x: torch.Tensor, given: dict[str, Any]) -> QueriesKeys:
    """q and k of a site with global attention.

    Args:
        x: what the watched module was given, [B, N, C].
        given: what else, by name.
    """
    if timm_class(site.attn) is POOL:
        return _read_pool(site.attn, x, given)
    attn: Any = site.attn
    rope, half = given.get("rope"), getattr(attn, "rotate_half", False)
    groups = getattr(attn, "num_kv_groups", 1)

    def finish(t: torch.Tensor, which: int, index: torch.Tensor) -> torch.Tensor:
        """From the projection [B, n, A] to the heads [B, heads, n, D] that are multiplied."""
        heads = attn.num_heads if which == 0 else getattr(attn, "num_kv_heads", attn.num_heads)
        dtype, t = t.dtype, t.unflatten(-1, (heads, -1)).transpose(1, 2)
        norm = getattr(attn, ("q_norm", "k_norm")[which], None)
        if norm is not None:
            t = norm(t)
        if rope is not None:
            place = index - attn.num_prefix_tokens
            turned = apply_rot_embed_cat(t, rope[..., place.clamp(min=0), :], half=half)
            t = torch.where((place >= 0)[:, None], turned, t).to(dtype)
        return t.repeat_interleave(groups, 1) if which == 1 and groups > 1 else t

    modules = [site.norm, getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)]
    queries, keys = _split(site.norm, projection_of(attn), x, finish, modules)
    terms = _masks(given, "attn_mask")
    if timm_class(attn) is beit.Attention:
        terms = _beit_bias(attn) + _masks(given, "shared_rel_pos_bias")
    elif timm_class(attn) is relpos.RelPosAttention:
        terms = _relative_bias(attn, given)
    scale = None if attn.fused_attn else attn.scale
    return QueriesKeys(
        queries, keys, x.shape[1], x.device, scale, terms, bool(given.get("is_causal"))
    )


@dataclass
class Projection:
    """How q and k are made of normed tokens.

    part: (tokens, 0 for q or 1 for k) -> [B, n, A]; None where that cannot be had in part. whole:
    tokens -> q and k. modules: those whose being plain decides it.
    """

    part: Callable[[torch.Tensor, int], torch.Tensor]
    whole: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    modules: tuple[Any, ...]


def projection_of(attn: Any) -> Projection:
    if timm_class(attn) is PARALLEL:
        _, width, _, _ = attn.in_split
        return _packed(attn.in_proj, width, attn.in_split[0])
    if getattr(attn, "qkv", None) is None:
        layers = attn.q_proj, attn.k_proj
        return Projection(
            lambda y, which: layers[which](y), lambda y: (layers[0](y), layers[1](y)), layers
        )
    q_bias = getattr(attn, "q_bias", None)
    if q_bias is None:
        return _packed(attn.qkv, None, 0)
    biases, separate = (q_bias, attn.k_bias, attn.v_bias), attn.qkv_bias_separate
    width = len(q_bias)

    def whole(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if separate:
            found = attn.qkv(y) + torch.cat(biases)
        else:  # timm reads the weight, whatever the module is
            found = F.linear(y, attn.qkv.weight, torch.cat(biases))
        return found[..., :width], found[..., width : 2 * width]

    def part(y: torch.Tensor, which: int) -> torch.Tensor:
        rows = attn.qkv.weight[which * width : (which + 1) * width]
        if separate:
            return F.linear(y, rows) + biases[which]
        return F.linear(y, rows, biases[which])

    return Projection(part, whole, (attn.qkv,))


def _packed(layer: Any, width: int | None, start: int) -> Projection:
    """Of one linear layer whose result holds q from `start` on, then k; a third of it each where
    no width is told."""

    def cut(found: torch.Tensor, which: int) -> torch.Tensor:
        size = found.shape[-1] // 3 if width is None else width
        return found[..., start + which * size : start + (which + 1) * size]

    def part(y: torch.Tensor, which: int) -> torch.Tensor:
        rows = cut(layer.weight.t(), which).t()
        return F.linear(y, rows, None if layer.bias is None else cut(layer.bias, which))

    def whole(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = layer(y)
        return cut(found, 0), cut(found, 1)

    return Projection(part, whole, (layer,))


def _is_plain(module: Any) -> bool:
    """Whether a module's result for a token depends on the module's weights and that token only,
    and a linear layer's on nothing but its weights."""
    if timm_class(module) not in _TOKENWISE or module._modules:
        return False
    try:
        check_bare(module, "it")
    except Unfit:
        return False
    return all(
        type(t) in (torch.Tensor, nn.Parameter)
        for t in module._parameters.values()
        if t is not None
    )


Finish = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]


def _split(
    norm: Any, projection: Projection, x: torch.Tensor, finish: Finish, around: list[Any]
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """The functions that give q and k of tokens: of those alone where all modules are plain.

    around: those besides the projection's, or None.
    """
    if all(module is None or _is_plain(module) for module in (*around, *projection.modules)):

        def few(which: int, index: torch.Tensor) -> torch.Tensor:
            y = x[:, index] if norm is None else norm(x[:, index])
            return finish(projection.part(y, which), which, index)

        return (lambda index: few(0, index)), (lambda index: few(1, index))
    every = torch.arange(x.shape[1], device=x.device)
    y = x if norm is None else norm(x)
    q, k = (finish(t, which, every) for which, t in enumerate(projection.whole(y)))
    return (lambda index: q[:, :, index]), (lambda index: k[:, :, index])


def _masks(given: dict[str, Any], name: str) -> list[Term]:
    """A tensor that broadcasts to [B, heads, N, N], as a term; none where none was given."""
    dense = given.get(name)
    if dense is None:
        return []

    def rows(of: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        found = dense if dense.shape[-2] == 1 else dense[..., of, :]
        return found if found.shape[-1] == 1 else found[..., to]

    return [rows]


def _beit_bias(attn: Any) -> list[Term]:
    """BEiT's relative position bias: only the queries' rows of it."""
    if attn.relative_position_bias_table is None:
        return []

    def rows(of: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        index = attn.relative_position_index[of][:, to]
        return attn.relative_position_bias_table[index].permute(2, 0, 1)

    return [rows]


def _relative_bias(attn: Any, given: dict[str, Any]) -> list[Term]:
    """That of timm's ViTs with relative positions, which themselves make the whole of it."""
    shared = _masks(given, "shared_rel_pos")
    if attn.rel_pos is None:
        return shared
    own = _masks({"bias": attn.rel_pos.get_bias()}, "bias")
    return own if attn.fused_attn else own + shared


def _read_pool(attn: Any, x: torch.Tensor, given: dict[str, Any]) -> QueriesKeys:
    """q of the latent tokens and k of the pooled ones."""
    if attn.pos_embed is not None:
        x = x + attn.pos_embed.unsqueeze(0).to(x.dtype)
    latent = attn.latent.expand(x.shape[0], -1, -1)

    def heads(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)

    q = attn.q_norm(heads(attn.q(latent)))
    plain = _is_plain(attn.kv) and _is_plain(attn.k_norm)
    every = None if plain else attn.k_norm(heads(attn.kv(x).chunk(2, -1)[0]))

    def keys(index: torch.Tensor) -> torch.Tensor:
        if every is not None:
            return every[:, :, index]
        weight, bias = attn.kv.weight, attn.kv.bias
        half = len(weight) // 2
        part = F.linear(x[:, index], weight[:half], None if bias is None else bias[:half])
        return attn.k_norm(heads(part))

    return QueriesKeys(
        lambda index: q[:, :, index], keys, x.shape[1], x.device,
        None if attn.fused_attn else attn.scale, _masks(given, "attn_mask"),
    )  # fmt: skip
