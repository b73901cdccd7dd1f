"""Random arguments for each op: the problems of `vitfast.check.fuzz`.

One function an op. It gets three ways to draw, all from the problem's own generator, and gives the
op's arguments; what they mean is in the op's `api.py`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch

from vitfast.ops.spec import randn
from vitfast.ops.varlen_attention.spec import cumulative

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""(args, kwargs) of a call."""
Pick = Callable[..., Any]
"""(*choices) -> one of them."""
Size = Callable[[int, int], int]
"""(low, high) -> a whole number, both ends included."""
Randn = Callable[..., torch.Tensor]
"""(*shape, scale=1.0) -> normal values of this standard deviation, in the working dtype."""


def random_call(op: str, dtype: torch.dtype, seed: int) -> Arguments:
    """Small and odd arguments of an op, on the CPU; the same for the same op, dtype and seed.

    Sizes vary freely. What kernels are compiled for (head dim, patch, activation) comes from short
    lists, or a GPU's time would go into compiling. No row is so short that its norm or its softmax
    is constant, and its gradient nothing but rounding.
    """
    g = torch.Generator().manual_seed(zlib.crc32(f"{op} {seed}".encode()))

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=g))]

    def size(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=g))

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return randn(g, *shape, dtype=dtype, scale=scale)

    return _CALLS[op](pick, size, normal)


def _norm(pick: Pick, size: Size, normal: Randn) -> Arguments:
    c = pick(size(3, 80), size(81, 1100), 384, 768)
    x = normal(size(1, 3), size(1, 40), c)
    weight, bias = pick((None, None), (1 + normal(c, scale=0.1), normal(c, scale=0.1)))
    return (x, weight, bias, pick(1e-6, 1e-5)), {}


def _rms_norm(pick: Pick, size: Size, normal: Randn) -> Arguments:
    (x, weight, _, eps), _ = _norm(pick, size, normal)
    return (x, weight, eps), {}


def _residual(pick: Pick, size: Size, normal: Randn) -> Arguments:
    b, n, c = size(1, 3), size(1, 40), pick(size(3, 80), size(81, 1100), 768)
    options: dict[str, Any] = {}
    if pick(True, False):
        options["gamma"] = normal(c)
    if pick(True, False):
        options["drop_scale"] = torch.tensor([1.25, *(pick(0.0, 1.25) for _ in range(b - 1))])
    return (normal(b, n, c), normal(b, n, c)), options


def _add_norm(pick: Pick, size: Size, normal: Randn) -> Arguments:
    (x, branch), options = _residual(pick, size, normal)
    c = x.shape[-1]
    kind = pick("layer", "rms")
    bias = normal(c, scale=0.1) if kind == "layer" else None
    return (x, branch, 1 + normal(c, scale=0.1), bias, 1e-6), {**options, "norm": kind}


def _norm_add(pick: Pick, size: Size, normal: Randn) -> Arguments:
    (x, branch, weight, bias, eps), options = _add_norm(pick, size, normal)
    options.pop("gamma", None)
    return (x, branch, weight, bias, eps), options


def _patch_merge(pick: Pick, size: Size, normal: Randn) -> Arguments:
    c = pick(size(3, 80), 96, 128, 192, 384)
    x = normal(size(1, 3), size(1, 14), size(1, 14), c)
    norm = pick("layer", "layer", "rms", None)
    weight = None if norm is None else 1 + normal(4 * c, scale=0.1)
    bias = normal(4 * c, scale=0.1) if norm == "layer" else None
    return (x, weight, bias), {"norm": norm}


def _attention(pick: Pick, size: Size, normal: Randn) -> Arguments:
    b, h, d = size(1, 2), size(1, 3), pick(13, 64, 64, 72, 128)
    n = pick(size(2, 20), size(21, 300))
    k = pick(n, size(2, 200))
    options: dict[str, Any] = {}
    if pick(True, False, False):
        options["bias"] = normal(h, n, k)
    if pick(True, False, False):
        options["mask"] = normal(b, 1, 1, k) > -1.0
        options["mask"][..., 0] = True
    if pick(True, False, False):
        options["is_causal"] = True
    if pick(True, False, False):
        options["qk_norm"] = pick("layer", "rms")
    return (normal(b, n, h, d), normal(b, k, h, d), normal(b, k, h, d)), options


def _varlen_attention(pick: Pick, size: Size, normal: Randn) -> Arguments:
    h, d = size(1, 3), pick(13, 64, 64, 72, 128)
    # One of them is long: of a few tokens alone, whose sums are short, the errors are luck.
    lengths = [pick(0, size(2, 20), size(21, 200)) for _ in range(size(0, 5))]
    lengths.insert(size(0, len(lengths)), size(40, 200))
    total = sum(lengths)
    options: dict[str, Any] = {}
    if pick(True, False, False):
        options["is_causal"] = True
    if pick(True, False, False):
        options["qk_norm"] = pick("layer", "rms")
    return (*(normal(total, h, d) for _ in range(3)), cumulative(lengths)), options


def _linear_act(pick: Pick, size: Size, normal: Randn) -> Arguments:
    m, n, k = size(1, 300), 2 * size(1, 150), pick(size(1, 70), size(71, 800))
    gate = pick(None, None, "first", "last")
    act = pick("none", "gelu", "silu")
    x, weight = normal(m, k), normal(n, k, scale=k**-0.5)
    return (x, weight, pick(None, normal(n, scale=0.1)), act), {"gate": gate}


def _mlp(pick: Pick, size: Size, normal: Randn) -> Arguments:
    (x, weight, bias, act), options = _linear_act(pick, size, normal)
    hidden, out = len(weight) // (2 if options["gate"] else 1), size(1, 90)
    return (x, weight, bias, normal(out, hidden, scale=hidden**-0.5), None, act), options


def _patch_embed(pick: Pick, size: Size, normal: Randn) -> Arguments:
    (p, q, cin), c = pick((16, 16, 3), (14, 14, 3), (5, 3, 4)), size(1, 100)
    rows, columns, b = size(1, 6), size(1, 6), size(1, 3)
    n = rows * columns
    options: dict[str, Any] = {}
    prefix = pick(0, 1, 5)
    if prefix:
        options["prefix"] = normal(1, prefix, c)
    if pick(True, False):
        options["pos_embed"] = normal(1, pick(n, n + prefix), c)
    weight = normal(c, cin, p, q, scale=(cin * p * q) ** -0.5)
    return (normal(b, cin, rows * p, columns * q), weight, pick(None, normal(c))), options


def _window_attention(pick: Pick, size: Size, normal: Randn) -> Arguments:
    heads, dim = size(1, 3), pick(16, 32, 44)
    window = pick((4, 4), (7, 7), (5, 6), (9, 8))
    shift = pick((0, 0), (window[0] // 2, window[1] // 2), (0, 1))
    # Where nearly all keys are padding, PyTorch sums equal numbers, with next to no error.
    high, wide = (size(w // 2 + 1, 20) for w in window)
    qkv = normal(size(1, 2), high, wide, 3, heads, dim)
    table = normal((2 * window[0] - 1) * (2 * window[1] - 1), heads)
    # A shift can leave the padding alone in its bands: it would have no gradient to speak of.
    whole = high % window[0] == wide % window[1] == 0
    pad = None if any(shift) or whole else pick(None, normal(3, heads, dim))
    return (qkv, window, shift, table, pad), {"roll_first": pick(True, False)}


def _dwconv_norm(pick: Pick, size: Size, normal: Randn) -> Arguments:
    c, k, q = pick(size(3, 80), 96, 192, size(81, 400)), pick(3, 5, 7, 7, 9), pick(3, 7, 7, 11)
    x = normal(size(1, 3), size(1, 14), size(1, 14), c)
    norm = pick("layer", "layer", "rms", None)
    bias = pick(None, normal(c, scale=0.1))
    norm_weight = None if norm is None else 1 + normal(c, scale=0.1)
    norm_bias = normal(c, scale=0.1) if norm == "layer" else None
    weight = normal(c, 1, k, q, scale=(k * q) ** -0.5)
    return (x, weight, bias, norm_weight, norm_bias), {"norm": norm}


def _grn(pick: Pick, size: Size, normal: Randn) -> Arguments:
    c = pick(size(3, 80), size(81, 1100), 384)
    x = normal(size(1, 3), size(2, 20), size(2, 20), c)
    if pick(True, False):
        x = x.movedim(-1, 1).contiguous().movedim(1, -1)
    return (x, normal(c), normal(c)), {}


def _group_norm_act(pick: Pick, size: Size, normal: Randn) -> Arguments:
    groups = size(1, 6)
    shape = (size(1, 3), groups * size(1, 12), size(2, 20), size(2, 20))
    c = shape[1]
    weight, bias = pick((None, None), (1 + normal(c, scale=0.1), normal(c, scale=0.1)))
    maps = [t.to(memory_format=pick(torch.channels_last, torch.contiguous_format))
            for t in (normal(*shape), normal(*shape))]  # fmt: skip
    options = {"residual": pick(None, maps[1]), "act": pick("none", "relu")}
    return (maps[0], groups, weight, bias), options


_CALLS: dict[str, Callable[[Pick, Size, Randn], Arguments]] = {
    "layer_norm": _norm,
    "rms_norm": _rms_norm,
    "add_norm": _add_norm,
    "norm_add": _norm_add,
    "residual_add": _residual,
    "attention": _attention,
    "varlen_attention": _varlen_attention,
    "linear_act": _linear_act,
    "mlp": _mlp,
    "patch_embed": _patch_embed,
    "patch_merge": _patch_merge,
    "window_attention": _window_attention,
    "dwconv_norm": _dwconv_norm,
    "grn": _grn,
    "group_norm_act": _group_norm_act,
}
