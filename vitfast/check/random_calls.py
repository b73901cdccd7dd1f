"""Arguments of each op drawn at random, for `vitfast.check.fuzz`."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch

from vitfast.ops.spec import randn


def random_call(op: str, dtype: torch.dtype, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of an op, small and odd, that depend on the number only.

    Sizes vary freely. What kernels are compiled for (head dim, patch, activation) comes from short
    lists, or a GPU's time would go into compiling. No row is so short that its norm or its softmax
    is constant, and its gradient nothing but rounding.
    """
    g = torch.Generator().manual_seed(zlib.crc32(f"{op} {seed}".encode()))

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=g))]

    def size(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=g))

    def tensor(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return randn(g, *shape, dtype=dtype, scale=scale)

    return _RANDOM[op](pick, size, tensor)


def _norm(pick, size, tensor):
    c = pick(size(3, 80), size(81, 1100), 384, 768)
    x = tensor(size(1, 3), size(1, 40), c)
    weight, bias = pick((None, None), (1 + tensor(c, scale=0.1), tensor(c, scale=0.1)))
    return (x, weight, bias, pick(1e-6, 1e-5)), {}


def _rms_norm(pick, size, tensor):
    (x, weight, _, eps), _ = _norm(pick, size, tensor)
    return (x, weight, eps), {}


def _residual(pick, size, tensor):
    b, n, c = size(1, 3), size(1, 40), pick(size(3, 80), size(81, 1100), 768)
    options = {}
    if pick(True, False):
        options["gamma"] = tensor(c)
    if pick(True, False):
        options["drop_scale"] = torch.tensor([1.25, *(pick(0.0, 1.25) for _ in range(b - 1))])
    return (tensor(b, n, c), tensor(b, n, c)), options


def _add_norm(pick, size, tensor):
    (x, branch), options = _residual(pick, size, tensor)
    c = x.shape[-1]
    kind = pick("layer", "rms")
    bias = tensor(c, scale=0.1) if kind == "layer" else None
    return (x, branch, 1 + tensor(c, scale=0.1), bias, 1e-6), {**options, "norm": kind}


def _norm_add(pick, size, tensor):
    (x, branch, weight, bias, eps), options = _add_norm(pick, size, tensor)
    options.pop("gamma", None)
    return (x, branch, weight, bias, eps), options


def _patch_merge(pick, size, tensor):
    c = pick(size(3, 80), 96, 128, 192, 384)
    x = tensor(size(1, 3), size(1, 14), size(1, 14), c)
    norm = pick("layer", "layer", "rms", None)
    weight = None if norm is None else 1 + tensor(4 * c, scale=0.1)
    bias = tensor(4 * c, scale=0.1) if norm == "layer" else None
    return (x, weight, bias), {"norm": norm}


def _attention(pick, size, tensor):
    b, h, d = size(1, 2), size(1, 3), pick(13, 64, 64, 72, 128)
    n = pick(size(2, 20), size(21, 300))
    k = pick(n, size(2, 200))
    options: dict[str, Any] = {}
    if pick(True, False, False):
        options["bias"] = tensor(h, n, k)
    if pick(True, False, False):
        options["mask"] = tensor(b, 1, 1, k) > -1.0
        options["mask"][..., 0] = True
    if pick(True, False, False):
        options["is_causal"] = True
    if pick(True, False, False):
        options["qk_norm"] = pick("layer", "rms")
    return (tensor(b, n, h, d), tensor(b, k, h, d), tensor(b, k, h, d)), options


def _linear_act(pick, size, tensor):
    m, n, k = size(1, 300), 2 * size(1, 150), pick(size(1, 70), size(71, 800))
    gate = pick(None, None, "first", "last")
    act = pick("none", "gelu", "silu")
    x, weight = tensor(m, k), tensor(n, k, scale=k**-0.5)
    return (x, weight, pick(None, tensor(n, scale=0.1)), act), {"gate": gate}


def _mlp(pick, size, tensor):
    (x, weight, bias, act), options = _linear_act(pick, size, tensor)
    hidden, out = len(weight) // (2 if options["gate"] else 1), size(1, 90)
    return (x, weight, bias, tensor(out, hidden, scale=hidden**-0.5), None, act), options


def _patch_embed(pick, size, tensor):
    (p, q, cin), c = pick((16, 16, 3), (14, 14, 3), (5, 3, 4)), size(1, 100)
    rows, columns, b = size(1, 6), size(1, 6), size(1, 3)
    n = rows * columns
    options: dict[str, Any] = {}
    prefix = pick(0, 1, 5)
    if prefix:
        options["prefix"] = tensor(1, prefix, c)
    if pick(True, False):
        options["pos_embed"] = tensor(1, pick(n, n + prefix), c)
    weight = tensor(c, cin, p, q, scale=(cin * p * q) ** -0.5)
    return (tensor(b, cin, rows * p, columns * q), weight, pick(None, tensor(c))), options


def _window_attention(pick, size, tensor):
    heads, dim = size(1, 3), pick(16, 32, 44)
    window = pick((4, 4), (7, 7), (5, 6), (9, 8))
    shift = pick((0, 0), (window[0] // 2, window[1] // 2), (0, 1))
    # Where nearly all keys are padding, PyTorch sums equal numbers, with next to no error.
    high, wide = (size(w // 2 + 1, 20) for w in window)
    qkv = tensor(size(1, 2), high, wide, 3, heads, dim)
    table = tensor((2 * window[0] - 1) * (2 * window[1] - 1), heads)
    # A shift can leave the padding alone in its bands: it would have no gradient to speak of.
    whole = high % window[0] == wide % window[1] == 0
    pad = None if any(shift) or whole else pick(None, tensor(3, heads, dim))
    return (qkv, window, shift, table, pad), {"roll_first": pick(True, False)}


def _dwconv_norm(pick, size, tensor):
    c, k, q = pick(size(3, 80), 96, 192, size(81, 400)), pick(3, 5, 7, 7, 9), pick(3, 7, 7, 11)
    x = tensor(size(1, 3), size(1, 14), size(1, 14), c)
    norm = pick("layer", "layer", "rms", None)
    bias = pick(None, tensor(c, scale=0.1))
    norm_weight = None if norm is None else 1 + tensor(c, scale=0.1)
    norm_bias = tensor(c, scale=0.1) if norm == "layer" else None
    weight = tensor(c, 1, k, q, scale=(k * q) ** -0.5)
    return (x, weight, bias, norm_weight, norm_bias), {"norm": norm}


def _grn(pick, size, tensor):
    c = pick(size(3, 80), size(81, 1100), 384)
    x = tensor(size(1, 3), size(2, 20), size(2, 20), c)
    if pick(True, False):
        x = x.movedim(-1, 1).contiguous().movedim(1, -1)
    return (x, tensor(c), tensor(c)), {}


def _group_norm_act(pick, size, tensor):
    groups = size(1, 6)
    shape = (size(1, 3), groups * size(1, 12), size(2, 20), size(2, 20))
    c = shape[1]
    weight, bias = pick((None, None), (1 + tensor(c, scale=0.1), tensor(c, scale=0.1)))
    maps = [t.to(memory_format=pick(torch.channels_last, torch.contiguous_format))
            for t in (tensor(*shape), tensor(*shape))]  # fmt: skip
    options = {"residual": pick(None, maps[1]), "act": pick("none", "relu")}
    return (maps[0], groups, weight, bias), options


_RANDOM: dict[str, Callable[..., Any]] = {
    "layer_norm": _norm,
    "rms_norm": _rms_norm,
    "add_norm": _add_norm,
    "norm_add": _norm_add,
    "residual_add": _residual,
    "attention": _attention,
    "linear_act": _linear_act,
    "mlp": _mlp,
    "patch_embed": _patch_embed,
    "patch_merge": _patch_merge,
    "window_attention": _window_attention,
    "dwconv_norm": _dwconv_norm,
    "grn": _grn,
    "group_norm_act": _group_norm_act,
}
