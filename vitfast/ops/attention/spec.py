"""Samples and cost of `attention`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from vitfast.ops.attention.api import DISPATCHER, attention
from vitfast.ops.attention.reference import attention as reference
from vitfast.ops.spec import Cost, OpSpec, Sample, randn, tensor_bytes

ODD, SMALL, TILE = ("odd",), ("odd", "small"), ("odd", "tiles")

_Sizes = tuple[int, int, int, int, int]
"""B, H, Nq, Nk and D."""
_Extra = Callable[[torch.dtype, torch.Generator, _Sizes], dict[str, Any]]
"""Makes further keyword arguments of a sample."""
_Change = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Iterable[torch.Tensor]]
"""Makes other q, k and v."""


def _sample(
    name: str,
    tokens: int,
    heads: int,
    dim: int,
    *extras: _Extra,
    batch: int = 1,
    keys: int | None = None,
    tags: tuple[str, ...] = ODD,
    change: _Change | None = None,
    **options: Any,
) -> Sample:
    """One sample: packed q, k and v, or separate ones where `keys` or `change` asks for it.

    Args:
        extras: give further keyword arguments.
        change: gives q, k and v other values, strides or shapes.
    """

    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        sizes = (batch, heads, tokens, tokens if keys is None else keys, dim)
        args: tuple[torch.Tensor, ...]
        if keys is None and change is None:
            args = (randn(g, batch, tokens, 3, heads, dim, dtype=dtype),)
        else:
            counts = (tokens, sizes[3], sizes[3])
            args = tuple(randn(g, batch, n, heads, dim, dtype=dtype) for n in counts)
            args = args if change is None else tuple(change(*args))
        kwargs = dict(options)
        for extra in extras:
            kwargs |= extra(dtype, g, sizes)
        return args, kwargs

    return Sample(name, make, frozenset(tags))


# ---- rotary embeddings ---------------------------------------------------------------------------


def _rope(
    prefix: int = 0,
    half: bool = False,
    per_head: bool = False,
    per_batch: bool = False,
    uneven: bool = False,
) -> _Extra:
    """cat(sin, cos) of random angles, float32, as timm's modules keep it; or `uneven`, with another
    angle for each of a pair, which no model has, but which tells the two apart."""

    def extra(dtype: torch.dtype, g: torch.Generator, sizes: _Sizes) -> dict[str, Any]:
        batch, heads, tokens, _, dim = sizes
        leading = (batch, 1) if per_batch else (heads,) if per_head else ()
        made = (*leading, tokens - prefix, dim if uneven else dim // 2)
        angles = torch.rand(made, generator=g, device="cpu") * 6.28
        if not uneven:
            angles = torch.cat([angles, angles], -1) if half else angles.repeat_interleave(2, -1)
        rope = torch.cat([angles.sin(), angles.cos()], -1)
        return {"rope": rope, "rope_prefix": prefix, "rope_half": half}

    return extra


# ---- norms ---------------------------------------------------------------------------------------


def _norm(
    kind: str, eps: float = 1e-6, bias: bool = True, dtype: torch.dtype | None = None
) -> _Extra:
    """Weights (and biases) of q/k norm, in the working dtype or `dtype`."""

    def extra(working: torch.dtype, g: torch.Generator, sizes: _Sizes) -> dict[str, Any]:
        made: dict[str, Any] = {"qk_norm": kind, "qk_norm_eps": eps}
        for name in ("q_norm", "k_norm"):
            made[f"{name}_weight"] = 1 + randn(g, sizes[-1], dtype=dtype or working, scale=0.1)
            if kind == "layer" and bias:
                made[f"{name}_bias"] = randn(g, sizes[-1], dtype=dtype or working, scale=0.1)
        return made

    return extra


# ---- masks and biases ----------------------------------------------------------------------------


def _keep(shape: str) -> _Extra:
    """Bool mask of a shape like "b11k"; every query keeps the first key."""

    def extra(dtype: torch.dtype, g: torch.Generator, sizes: _Sizes) -> dict[str, Any]:
        mask = torch.rand(_mask_shape(shape, sizes), generator=g, device="cpu") < 0.7
        mask[..., 0] = True
        return {"mask": mask}

    return extra


def _add(shape: str, dtype: torch.dtype | None = None) -> _Extra:
    """Float mask with some -inf; every query keeps the first key."""

    def extra(working: torch.dtype, g: torch.Generator, sizes: _Sizes) -> dict[str, Any]:
        drop = ~_keep(shape)(working, g, sizes)["mask"]
        mask = randn(g, *_mask_shape(shape, sizes), dtype=dtype or working)
        return {"mask": mask.masked_fill(drop, float("-inf"))}

    return extra


def _mask_shape(shape: str, sizes: _Sizes) -> tuple[int, ...]:
    known = dict(zip("bhqk1", (*sizes[:4], 1), strict=True))
    return tuple(known[letter] for letter in shape)


def _first_queries_blind(kind: str) -> _Extra:
    """The first three queries see no key at all."""

    def extra(dtype: torch.dtype, g: torch.Generator, sizes: _Sizes) -> dict[str, Any]:
        queries, keys = sizes[2:4]
        mask = (torch.arange(queries, device="cpu")[:, None] >= 3).expand(queries, keys)
        if kind == "float":
            mask = torch.zeros(queries, keys, dtype=dtype, device="cpu").masked_fill(
                ~mask, float("-inf")
            )
        return {"mask": mask}

    return extra


def _naflex(shape: str) -> _Extra:
    """NaFlexViT's padding mask: the dtype's lowest number, for whole rows where symmetric."""

    def extra(dtype: torch.dtype, g: torch.Generator, sizes: _Sizes) -> dict[str, Any]:
        batch, _, tokens, _, _ = sizes
        valid = (
            torch.arange(tokens, device="cpu")
            < tokens - 5 * torch.arange(1, batch + 1, device="cpu")[:, None]
        )
        keep = valid[:, None, None, :]
        if shape == "b1qk":
            keep = keep & valid[:, None, :, None]
        mask = torch.zeros(keep.shape, dtype=dtype, device="cpu").masked_fill(
            ~keep, torch.finfo(dtype).min
        )
        return {"mask": mask}

    return extra


def _bias(
    leading: tuple[int, ...] = (), dtype: torch.dtype | None = None, scale: float = 1.0
) -> _Extra:
    def extra(working: torch.dtype, g: torch.Generator, sizes: _Sizes) -> dict[str, Any]:
        shape = (*leading, *sizes[1:4])
        return {"bias": randn(g, *shape, dtype=dtype or working, scale=scale)}

    return extra


# ---- values and strides of q, k and v ------------------------------------------------------------


def _logits_near(value: float) -> _Change:
    """Shifts every score by the same value, which softmax cancels and exp does not survive."""

    def change(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterable[torch.Tensor]:
        q[..., -1] = value * q.shape[-1] ** 0.5
        k[..., -1] = 1
        return q, k, v

    return change


def _outliers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterable[torch.Tensor]:
    q[..., :2] /= 50
    k[..., :2] *= 50
    v[..., 1:3] *= 50
    return q, k, v


def _one_hot(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterable[torch.Tensor]:
    _, tokens, heads, dim = v.shape
    hot = (
        torch.arange(tokens, device="cpu")[:, None] * 5 + torch.arange(heads, device="cpu")
    ) % dim
    return q, k, (torch.arange(dim, device="cpu") == hot[..., None]).to(v.dtype).expand_as(v)


def _heads_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterable[torch.Tensor]:
    return (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))


def _every_second(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterable[torch.Tensor]:
    return q[:, ::2], k[:, ::2], v[:, ::2]


def _strided_last(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterable[torch.Tensor]:
    return (t.mT.contiguous().mT for t in (q, k, v))


def _expanded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterable[torch.Tensor]:
    return q[:1].expand_as(q), k[:, :, :1].expand_as(k), v


SHAPES = (
    _sample("vit_base_224", 197, 12, 64, tags=("real", "check")),
    _sample("vit_small_224_batch_8", 197, 6, 64, batch=8, tags=("real",)),
    _sample("vit_base_1024", 4097, 12, 64, tags=("real", "large")),
    _sample("vit_large_4k", 32_400, 16, 64, tags=("real", "large")),
    _sample("dinov2_small_518", 1370, 6, 64, tags=("real",)),
    _sample("dinov3_small_224", 201, 6, 64, _rope(5, half=True), tags=("real", "check")),
    _sample("eva02_base_224", 257, 12, 64, _rope(1), tags=("real", "check")),
    _sample("rope_mixed_small_224", 197, 6, 64, _rope(1, per_head=True), tags=("real",)),
    _sample("so400m_384", 729, 16, 72, tags=("real",)),
    _sample("so400m_map_pool", 1, 16, 72, keys=729, tags=("real", "check")),
    _sample("huge_224", 257, 16, 80, tags=("real",)),
    _sample("giant_224", 257, 16, 88, tags=("real",)),
    _sample("beit_base_224", 197, 12, 64, _bias((1,)), tags=("real", "check")),
    _sample("naflex_base_256", 256, 12, 64, _naflex("b1qk"), batch=2, tags=("real",)),
)

HEAD_DIMS = tuple(
    _sample(f"head_dim_{dim}", 33, 2, dim, tags=("odd", "check") if dim in (24, 72, 256) else ODD)
    for dim in (1, 7, 8, 13, 16, 24, 32, 48, 72, 80, 88, 96, 104, 112, 128, 160, 256, 264)
)

TOKENS = (
    _sample("tokens_1", 1, 2, 8, tags=("odd", "small")),
    _sample("tokens_2", 2, 3, 16),
    _sample("tokens_5", 5, 2, 4, batch=2, tags=("odd", "small", "check")),
    _sample("tokens_17", 17, 2, 16),
    _sample("tokens_49", 49, 3, 32, batch=4),
    _sample("tokens_64", 64, 2, 32),
    _sample("tokens_65", 65, 2, 32, batch=3),
    _sample("tokens_257", 257, 2, 16),
    _sample("queries_1", 1, 3, 32, keys=70, batch=2),
    _sample("queries_70_keys_3", 70, 2, 32, keys=3),
    _sample("keys_2", 5, 2, 16, keys=2),
)

TILES = (
    # 96 keys are a tile of the forward's; 16 or 64 queries and 128 or 512 keys one of the backward.
    *(
        _sample(f"keys_{n}", 9, 2, 8, keys=n, tags=TILE)
        for n in (64, 65, 95, 96, 97, 127, 128, 129, 193)
    ),
    *(
        _sample(f"queries_{n}", n, 2, 8, keys=5, tags=TILE)
        for n in (15, 16, 31, 32, 33, 63, 64, 129)
    ),
    _sample("causal_95", 95, 1, 8, is_causal=True, tags=TILE),
    _sample("causal_97", 97, 1, 8, is_causal=True, tags=TILE),
    _sample("causal_193", 193, 2, 16, is_causal=True, tags=("odd", "tiles", "check")),
    _sample("causal_600", 600, 1, 8, is_causal=True, tags=TILE),
    _sample("causal_one_query", 1, 2, 16, keys=3, is_causal=True, change=_one_hot,
            tags=("odd", "tiles", "zero:q", "zero:k")),
    _sample("one_key", 3, 2, 8, keys=1, change=_one_hot, tags=("odd", "tiles", "zero:q", "zero:k")),
    _sample("mask_keys_101", 5, 2, 8, _keep("b11k"), keys=101, batch=2, tags=TILE),
    _sample("mask_float_keys_101", 5, 2, 8, _add("1hqk"), keys=101, batch=2, tags=TILE),
    _sample("bias_keys_101", 5, 2, 8, _bias(), keys=101, batch=2, tags=TILE),
    _sample("norm_layer_keys_1100", 5, 1, 16, _norm("layer"), keys=1100,
            tags=("odd", "tiles", "check", "zero:k_norm_bias")),
    _sample("norm_rms_keys_1100", 5, 1, 8, _norm("rms"), keys=1100, batch=2,
            tags=("odd", "tiles", "check")),
    _sample("bias_keys_1100", 5, 1, 8, _bias(), keys=1100, batch=2, tags=("odd", "tiles", "check")),
)  # fmt: skip

LAYOUTS = (
    _sample("separate", 37, 3, 16, change=lambda *qkv: qkv, batch=2),
    _sample("heads_first", 37, 3, 16, change=_heads_first, batch=2),
    _sample("every_second_token", 74, 3, 16, change=_every_second, batch=2),
    _sample("strided_last", 37, 3, 16, change=_strided_last, batch=2),
    _sample("expanded", 37, 3, 16, change=_expanded, batch=2),
)

MASKS = (
    _sample("mask_keys", 37, 3, 16, _keep("b11k"), batch=2, tags=("odd", "check")),
    _sample("mask_heads", 37, 3, 16, _keep("1hqk")),
    _sample("mask_tokens", 37, 3, 16, _keep("qk"), batch=2),
    _sample("mask_queries", 5, 2, 4, _add("h1k"), tags=SMALL),
    _sample("mask_float_keys", 70, 2, 16, _add("b11k"), batch=2),
    _sample("mask_float_full", 5, 2, 4, _add("bhqk"), batch=2, tags=SMALL),
    _sample("mask_float32", 37, 3, 16, _add("1hqk", torch.float32), tags=("odd", "check")),
    _sample("mask_cross", 9, 2, 16, _add("b1qk"), batch=2, keys=40),
    _sample("naflex", 40, 2, 32, _naflex("b1qk"), batch=3, tags=("odd", "check")),
    _sample("naflex_keys", 40, 2, 32, _naflex("b11k"), batch=3),
    _sample("blind_queries_bool", 37, 3, 16, _first_queries_blind("bool"), batch=2),
    _sample("blind_queries_float", 70, 2, 16, _first_queries_blind("float")),
    _sample("causal", 70, 2, 16, is_causal=True, tags=("odd", "check")),
    _sample("causal_more_keys", 5, 2, 4, keys=9, is_causal=True, tags=SMALL),
    _sample("causal_fewer_keys", 70, 2, 16, keys=20, is_causal=True),
    _sample("causal_mask", 37, 2, 16, _keep("b11k"), batch=2, is_causal=True),
    _sample("bias", 37, 3, 16, _bias(), batch=3, tags=("odd", "check")),
    _sample("bias_small", 5, 2, 4, _bias((1,)), batch=2, tags=SMALL),
    _sample("bias_large", 70, 2, 16, _bias(scale=4.0)),
    _sample("bias_float32", 70, 2, 16, _bias(dtype=torch.float32)),
    _sample("bias_mask_causal", 37, 3, 16, _bias(), _add("b11k"), batch=2, is_causal=True),
    _sample("bias_bool_mask", 37, 3, 16, _bias(), _keep("b1qk"), batch=2),
)

PROLOGUES = (
    _sample("norm_layer", 37, 3, 16, _norm("layer"), batch=2,
            tags=("odd", "check", "zero:k_norm_bias")),
    _sample("norm_layer_small", 7, 2, 4, _norm("layer", eps=1e-2, bias=False), tags=SMALL),
    _sample("norm_float32_weights", 37, 2, 32, _norm("layer", bias=False, dtype=torch.float32)),
    _sample("norm_layer_no_affine", 37, 2, 32, qk_norm="layer"),
    _sample("norm_rms", 40, 3, 24, _norm("rms", eps=1e-5), batch=2),
    _sample("norm_rms_small", 17, 2, 8, _norm("rms"), tags=SMALL),
    _sample("rope", 37, 3, 16, _rope(1), batch=2, tags=("odd", "check")),
    _sample("rope_half", 37, 3, 24, _rope(5, half=True), batch=2, tags=("odd", "check")),
    _sample("rope_heads", 37, 3, 16, _rope(per_head=True), batch=2),
    _sample("rope_batch", 37, 3, 16, _rope(2, half=True, per_batch=True), batch=2),
    _sample("rope_all_prefix", 5, 2, 16, _rope(5)),
    _sample("rope_uneven", 5, 2, 8, _rope(1, uneven=True), batch=2, tags=SMALL),
    _sample("rope_half_uneven", 5, 2, 8, _rope(1, half=True, uneven=True), batch=2, tags=SMALL),
    _sample("norm_layer_rope_uneven", 6, 2, 8, _norm("layer"), _rope(1, uneven=True), tags=SMALL),
    _sample("norm_rms_rope_half_uneven", 6, 2, 8, _norm("rms"), _rope(half=True, uneven=True),
            tags=SMALL),
    _sample("rope_small", 5, 2, 4, _rope(1), tags=SMALL),
    _sample("rope_half_small", 5, 2, 4, _rope(half=True), tags=SMALL),
    _sample("norm_layer_rope", 9, 1, 16, _norm("layer"), _rope(1)),
    _sample("norm_rms_rope_half_bias_mask", 37, 3, 16, _norm("rms"), _rope(4, half=True), _bias(),
            _keep("b11k"), batch=2, tags=("odd", "check")),
)  # fmt: skip

VALUES = (
    _sample("scale_negative", 37, 2, 16, scale=-0.3),
    _sample("scale_0", 37, 2, 16, change=lambda *qkv: qkv, scale=0.0,
            tags=("odd", "zero:q", "zero:k")),
    _sample("scale_1", 37, 2, 16, scale=1.0),
    _sample("logits_80", 37, 2, 32, change=_logits_near(80.0)),
    _sample("logits_minus_80", 37, 2, 32, change=_logits_near(-80.0)),
    # 43,000 and its 62,000 in powers of two have the same spacing of float32.
    _sample("logits_minus_43000", 37, 2, 32, change=_logits_near(-4.3e4)),
    _sample("outlier_channels", 65, 2, 64, change=_outliers, tags=("odd", "check")),
    _sample("one_hot", 37, 2, 32, change=_one_hot),
    _sample("empty_batch", 5, 2, 16, batch=0, tags=("odd", "empty")),
    _sample("empty_tokens", 0, 2, 16, tags=("odd", "empty")),
    _sample("empty_keys", 5, 2, 16, keys=0, tags=("odd", "empty", "zero:out0", "zero:q")),
)  # fmt: skip


def _cost(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cost:
    q, k, v = args[0].unbind(2) if len(args) == 1 else args
    batch, queries, heads, dim = q.shape
    flops = 4.0 * batch * heads * queries * k.shape[1] * dim
    extras = (t for t in kwargs.values() if isinstance(t, torch.Tensor))
    return Cost(flops=flops, bytes=2 * tensor_bytes(q) + tensor_bytes(k, v, *extras))


SPEC = OpSpec(
    name="attention",
    public=attention,
    reference=reference,
    dispatcher=DISPATCHER,
    cost=_cost,
    # The reference sums each row in one product; a flash kernel carries the row's normaliser, and
    # its rounding, through many steps. PyTorch's own (vendor) is as far off as this factor.
    rms_factor=2.0,
    # The largest error is that of the few largest weights, and luck: over seeds, and by the BLAS it
    # runs on, a result as exact as PyTorch's has 0.6 to 3.7 times PyTorch's largest error.
    backward_factor=4.0,
    samples=SHAPES + HEAD_DIMS + TOKENS + TILES + LAYOUTS + MASKS + PROLOGUES + VALUES,
)
