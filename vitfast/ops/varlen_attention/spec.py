"""Samples and cost of `varlen_attention`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

from vitfast.ops.spec import Cost, OpSpec, Sample, randn, tensor_bytes
from vitfast.ops.varlen_attention.api import DISPATCHER, varlen_attention
from vitfast.ops.varlen_attention.reference import varlen_attention as reference

ODD, SMALL, CHECK = ("odd",), ("odd", "small"), ("odd", "check")

_Sizes = tuple[int, int, int]
"""total, H and D."""
_Extra = Callable[[torch.dtype, torch.Generator, _Sizes], dict[str, Any]]
"""Makes further keyword arguments of a sample."""
_Change = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Iterable[torch.Tensor | None]]
"""Makes other q, k and v, or all three in one tensor."""


def cumulative(lengths: Sequence[int]) -> torch.Tensor:
    """cu_seqlens of sequences of these lengths."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")


def _sample(
    name: str,
    lengths: Sequence[int],
    heads: int,
    dim: int,
    *extras: _Extra,
    tags: tuple[str, ...] = ODD,
    change: _Change | None = None,
    **options: Any,
) -> Sample:
    """One sample: packed q, k and v, or separate ones where `change` asks for it."""
    cu_seqlens = cumulative(lengths)  # at once: it has values where only shapes are asked for, too

    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        total = sum(lengths)
        args: tuple[Any, ...]
        if change is None:
            args = (randn(g, total, 3, heads, dim, dtype=dtype), None, None)
        else:
            args = tuple(change(*(randn(g, total, heads, dim, dtype=dtype) for _ in range(3))))
        kwargs = dict(options)
        for extra in extras:
            kwargs |= extra(dtype, g, (total, heads, dim))
        return (*args, cu_seqlens), kwargs

    return Sample(name, make, frozenset(tags))


def _rope(half: bool = False, per_head: bool = False, uneven: bool = False) -> _Extra:
    """cat(sin, cos) of random angles, float32, every fifth token left alone; or `uneven`, with
    another angle for each of a pair, which tells the two apart."""

    def extra(dtype: torch.dtype, g: torch.Generator, sizes: _Sizes) -> dict[str, Any]:
        total, heads, dim = sizes
        made = (*((heads,) if per_head else ()), total, dim if uneven else dim // 2)
        angles = torch.rand(made, generator=g, device="cpu") * 6.28
        angles[..., ::5, :] = 0
        if not uneven:
            angles = torch.cat([angles, angles], -1) if half else angles.repeat_interleave(2, -1)
        return {"rope": torch.cat([angles.sin(), angles.cos()], -1), "rope_half": half}

    return extra


def _norm(kind: str, eps: float = 1e-6, dtype: torch.dtype | None = None) -> _Extra:
    """Weights (and biases) of q/k norm, in the working dtype or `dtype`."""

    def extra(working: torch.dtype, g: torch.Generator, sizes: _Sizes) -> dict[str, Any]:
        made: dict[str, Any] = {"qk_norm": kind, "qk_norm_eps": eps}
        for name in ("q_norm", "k_norm"):
            made[f"{name}_weight"] = 1 + randn(g, sizes[-1], dtype=dtype or working, scale=0.1)
            if kind == "layer":
                made[f"{name}_bias"] = randn(g, sizes[-1], dtype=dtype or working, scale=0.1)
        return made

    return extra


def _separate(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterable[torch.Tensor]:
    return q, k, v


def _one_hot(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One 1 in a row of v: where a token sees itself alone, the gradients of q and k are 0 exactly,
    in whatever order a kernel sums."""
    return q, k, torch.nn.functional.one_hot(v.argmax(-1), v.shape[-1]).to(v.dtype)


def _packed_one_hot(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Iterable[torch.Tensor | None]:
    return torch.stack(_one_hot(q, k, v), 1), None, None


def _heads_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterable[torch.Tensor]:
    return (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v))


def _out_of_wide_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterable[torch.Tensor]:
    """Slices of wide rows, of which nothing else is to be read."""
    for t in (q, k, v):
        wide = t.new_full((t.shape[0], 3 * t.shape[1], t.shape[2]), float("nan"))
        wide[:, t.shape[1] : 2 * t.shape[1]] = t
        yield wide[:, t.shape[1] : 2 * t.shape[1]]


NAFLEX = (196, 576, 64, 320, 100, 441, 256, 144)
"""Tokens of eight images of different sizes, as NaFlexViT takes them."""

SHAPES = (
    _sample("naflex_base", [n + 4 for n in NAFLEX], 12, 64, tags=("real",), max_seqlen=580),
    _sample("naflex_so400m", NAFLEX[:4], 16, 72, tags=("real",), max_seqlen=576),
    _sample("naflex_base_thumbnails", [17, 20, 23] * 16, 12, 64, tags=("real",)),
)

LENGTHS = (
    _sample("one_sequence", [33], 2, 32),
    _sample("of_one_token", [1], 2, 8, change=_packed_one_hot),
    _sample(
        "of_one_token_each", [1, 1, 1], 2, 8, change=_one_hot, tags=("odd", "zero:q", "zero:k")
    ),
    _sample("of_two_tokens", [2, 2, 2], 3, 16),
    _sample("zero_one_two", [0, 1, 2, 0, 5, 0], 2, 8, tags=(*SMALL, "check")),
    _sample("first_and_last_empty", [0, 0, 9, 0, 7, 0, 0], 2, 16),
    _sample("all_alike", [7, 7, 7], 2, 8, tags=SMALL),
    _sample("alike_but_one", [9, 9, 8, 9, 9], 2, 16, tags=CHECK),
    _sample("one_long_many_short", [3, 1, 211, 2, 2, 2, 5, 1, 1, 4], 2, 32, tags=CHECK),
    _sample("many_short", [1 + i % 7 for i in range(60)], 2, 16),
    _sample("odd_lengths", [13, 37, 65, 97, 3], 3, 32),
    _sample("with_max_seqlen", [5, 11, 8], 2, 16, max_seqlen=11),
    _sample("with_ample_max_seqlen", [5, 11, 8], 2, 16, max_seqlen=2048),
)

HEAD_DIMS = tuple(
    _sample(f"head_dim_{dim}", [9, 33, 1, 17], 2, dim, tags=CHECK if dim == 72 else ODD)
    for dim in (7, 32, 64, 72, 128, 256, 264)
)

LAYOUTS = (
    _sample("separate", [9, 20, 8], 3, 16, change=_separate),
    _sample("separate_small", [3, 4], 2, 4, change=_separate, tags=SMALL),
    _sample("heads_first", [9, 20, 8], 3, 16, change=_heads_first),
    _sample("out_of_wide_rows", [9, 20, 8], 3, 16, change=_out_of_wide_rows),
)

PROLOGUES = (
    _sample("norm_layer", [9, 20, 8], 3, 16, _norm("layer"), tags=(*CHECK, "zero:k_norm_bias")),
    _sample("norm_rms", [9, 20, 8], 3, 24, _norm("rms", eps=1e-5), tags=CHECK),
    _sample("norm_rms_small", [4, 0, 9], 2, 8, _norm("rms"), tags=SMALL),
    _sample("norm_float32_weights", [17, 20], 2, 32, _norm("rms", dtype=torch.float32)),
    _sample("rope", [9, 20, 8], 3, 16, _rope(), tags=CHECK),
    _sample("rope_half", [9, 20, 8], 3, 24, _rope(half=True), tags=CHECK),
    _sample("rope_heads", [9, 20, 8, 8], 3, 16, _rope(per_head=True), tags=CHECK),
    _sample("rope_small", [3, 4], 2, 4, _rope(uneven=True), tags=SMALL),
    _sample("norm_rms_rope_half", [5, 2, 6], 2, 8, _norm("rms"), _rope(half=True, uneven=True),
            tags=SMALL),
)  # fmt: skip

VALUES = (
    _sample("causal", [9, 20, 1, 8], 2, 16, is_causal=True, tags=CHECK),
    _sample("causal_long", [130, 97], 1, 8, is_causal=True),
    _sample("scale_1", [9, 20], 2, 16, scale=1.0),
    _sample("scale_negative", [9, 20], 2, 16, scale=-0.3),
    _sample("empty_batch", [], 2, 16, tags=("odd", "empty")),
    _sample("empty_sequences", [0, 0, 0], 2, 16, tags=("odd", "empty")),
)


def _cost(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cost:
    q, k, v, cu_seqlens = args
    heads, dim = q.shape[-2:]
    pairs = sum((end - begin) ** 2 for begin, end in pairwise(cu_seqlens.tolist()))
    extras = (t for t in kwargs.values() if isinstance(t, torch.Tensor))
    out = tensor_bytes(q) / (3 if k is None else 1)
    return Cost(flops=4.0 * heads * dim * pairs, bytes=out + tensor_bytes(q, k, v, *extras))


SPEC = OpSpec(
    name="varlen_attention",
    public=varlen_attention,
    reference=reference,
    dispatcher=DISPATCHER,
    cost=_cost,
    # As of `attention`, whose kernels these are.
    rms_factor=2.0,
    backward_factor=4.0,
    samples=SHAPES + LENGTHS + HEAD_DIMS + LAYOUTS + PROLOGUES + VALUES,
)
