"""MetaFormer's block in inference on the CPU: norm, token mixer, norm and MLP, channels last.

    x = scale1 * x + gamma1 * mixer(norm1(x))
    x = scale2 * x + gamma2 * mlp(norm2(x))

The mixer pools, attends, or is an inverted separable convolution. Activations may be StarReLU: its
ReLU goes with the product before it, its square is a pass over rows that are still in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from vitfast.engine import checks, memo
from vitfast.engine import rows as by_rows
from vitfast.engine.products.linear import PreparedLinear, PreparedMlp, prepare_linear, prepare_mlp
from vitfast.ops.attention import native as attention_op
from vitfast.ops.common import norm as norm_op
from vitfast.ops.dwconv_norm import native as dwconv_op
from vitfast.ops.group_norm_act import native as group_norm_op
from vitfast.plans import (
    Attention,
    GroupNorm,
    MetaFormerBlock,
    MetaFormerHalf,
    Norm,
    Pooling,
    SepConv,
    StarReLU,
    split_packed,
)
from vitfast.runtime import native


def run(x: torch.Tensor, plan: MetaFormerBlock) -> torch.Tensor | None:
    """The block on x [B, H, W, C] or, if it attends, [B, N, C]; None where it is for timm.

    The result has the dtype that the residual stream has in timm.
    """
    return memo.call(_run, _steps, by_rows.count(x), x, plan)


class _Steps(NamedTuple):
    """A block ready to run. dtypes: of the MLP's products, of its input and of the result."""

    plan: MetaFormerBlock
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    mix: Callable[[torch.Tensor, torch.Tensor], None]
    halves: PreparedMlp


def _steps(x: torch.Tensor, plan: MetaFormerBlock, autocast: torch.dtype | None) -> _Steps | None:
    if not _fit(x, plan, autocast):
        return None
    operand = autocast or x.dtype
    rows = by_rows.count(x)
    mixed = x.dtype if isinstance(plan.mixer, Pooling) else operand
    between = _stream(x.dtype, plan.first, mixed)
    return _Steps(
        plan,
        (operand, between, _stream(between, plan.second, operand)),
        _mixer(plan.mixer, plan.first, rows, operand),
        prepare_mlp(plan.mlp, rows, operand),
    )


def _run(steps: _Steps, x: torch.Tensor) -> torch.Tensor:
    plan, (operand, between, dtype), mix, halves = steps
    out = native.empty(x.shape, dtype)
    images = max(1, by_rows.WHOLE_ROWS // x[0, ..., 0].numel())
    for part, result in zip(x.contiguous().split(images), out.split(images), strict=True):
        middle = result if dtype == between else native.empty(part.shape, between)
        mix(part, middle)
        _add_mlp(middle, plan, halves, operand, result)
    return out


def _fit(x: torch.Tensor, plan: MetaFormerBlock, autocast: torch.dtype | None) -> bool:
    """Whether dtypes, devices and sizes are those the kernels take unchecked."""
    if not checks.dtypes_fit(x, autocast):
        return False
    channels, mixer, mlp = x.shape[-1], plan.mixer, plan.mlp
    dtypes = norm_op.DTYPES if autocast else (x.dtype,)
    hidden = len(mlp.fc1.weight)
    linears = [(mlp.fc1, hidden, channels), (mlp.fc2, channels, hidden)]
    stars = [plan.star]
    if isinstance(mixer, SepConv):
        width = len(mixer.fc1.weight)
        linears += [(mixer.fc1, width, channels), (mixer.fc2, channels, width)]
        stars.append(mixer.star)
        if not checks.depthwise(mixer.conv, width, dtypes):
            return False
    elif isinstance(mixer, Attention):
        linears += [(mixer.qkv[0], 3 * channels, channels), (mixer.proj, channels, channels)]
        if channels % mixer.heads or channels // mixer.heads > checks.MOST_HEAD_DIM:
            return False
    return (
        mlp.norm is None
        and all(checks.linear(*one, dtypes) for one in linears)
        and all(checks.vector(t, 1) for star in stars if star is not None for t in star)
        and all(
            checks.vector(t, channels)
            for half in (plan.first, plan.second)
            for t in (half.norm.weight, half.norm.bias, half.gamma, half.scale)
        )
    )


def _stream(x: torch.dtype, half: MetaFormerHalf, branch: torch.dtype) -> torch.dtype:
    """The dtype of scale * x + gamma * branch."""
    found = torch.promote_types(x, branch)
    for factor in (half.gamma, half.scale):
        found = found if factor is None else torch.promote_types(found, factor.dtype)
    return found


def _mixer(
    mixer: SepConv | Pooling | Attention, half: MetaFormerHalf, rows: int, operand: torch.dtype
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """What writes scale1 * x + gamma1 * mixer(norm1(x)) of some of the images to a tensor."""
    if isinstance(mixer, Pooling):

        def pool(x: torch.Tensor, out: torch.Tensor) -> None:
            normed = _normalised(x, half.norm, x.dtype)
            mixed = mixer.module(normed.permute(0, 3, 1, 2))
            _add(x, mixed.permute(0, 2, 3, 1), half, out)

        return pool
    inner: Callable[[torch.Tensor], torch.Tensor]
    if isinstance(mixer, SepConv):
        inner, last = _separable(mixer, rows, operand), mixer.fc2
    else:
        inner, last = _attended(mixer, rows, operand), mixer.proj
    layer = prepare_linear(last, rows, operand)

    def mix(x: torch.Tensor, out: torch.Tensor) -> None:
        mixed = inner(_normalised(x, half.norm, operand))
        base, result = (t.view(-1, t.shape[-1]) for t in (x, out))
        for before, part, after in by_rows.in_chunks(base, mixed, result):
            _add_result(before, layer, part, half, after)

    return mix


def _separable(
    mixer: SepConv, rows: int, operand: torch.dtype
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The rows that the last product takes, of maps [B, H, W, C]."""
    fc1 = prepare_linear(mixer.fc1, rows, operand, mixer.act)

    def run(x: torch.Tensor) -> torch.Tensor:
        hidden = _starred(fc1(x.view(-1, x.shape[3])), mixer.star)
        maps = hidden.view(*x.shape[:3], -1)
        return dwconv_op.run(maps, *mixer.conv, norm=None).view(hidden.shape)

    return run


def _attended(
    mixer: Attention, rows: int, operand: torch.dtype
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The rows that the last product takes, of tokens [B, N, C]."""
    project = prepare_linear(mixer.qkv[0], rows, operand)

    def run(x: torch.Tensor) -> torch.Tensor:
        packed = project(x.view(-1, x.shape[2])).view(*x.shape[:2], -1)
        q, k, v = split_packed(packed, mixer).unbind(2)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        attention_op.forward_direct(q, k, v, scale=q.shape[-1] ** -0.5, out=out)
        return out.view(len(packed) * packed.shape[1], -1)

    return run


def _add_mlp(
    x: torch.Tensor,
    plan: MetaFormerBlock,
    halves: PreparedMlp,
    operand: torch.dtype,
    out: torch.Tensor,
) -> None:
    """scale2 * x + gamma2 * mlp(norm2(x)) into `out`, which may be x."""
    half = plan.second
    over_image = isinstance(half.norm, GroupNorm)  # so before any of x is written over
    ready = _normalised(x, half.norm, operand) if over_image else x
    rows = (t.view(-1, t.shape[-1]) for t in (x, ready, out))
    for base, part, result in by_rows.in_chunks(*rows):
        normed = part if over_image else _normalised(part, half.norm, operand)
        hidden = [_starred(piece, plan.star) for piece in halves.hidden(normed)]
        _add_result(base, halves, hidden, half, result)


def _add_result(
    x: torch.Tensor,
    step: PreparedLinear | PreparedMlp,
    inner: Any,
    half: MetaFormerHalf,
    out: torch.Tensor,
) -> None:
    """scale * x + gamma * step(inner) into `out`, which may be x."""
    if half.scale is None:
        step.add_to(x, half.gamma, inner, out)
    else:
        _add(x, step(inner), half, out)


def _add(x: torch.Tensor, branch: torch.Tensor, half: MetaFormerHalf, out: torch.Tensor) -> None:
    if half.scale is None:
        by_rows.add(x, branch, half.gamma, out)
    else:
        branch = branch if half.gamma is None else branch * half.gamma
        by_rows.add(branch, x, half.scale, out)


def _normalised(x: torch.Tensor, norm: Norm | GroupNorm, dtype: torch.dtype) -> torch.Tensor:
    out = native.empty(x.shape, dtype)
    if isinstance(norm, Norm):
        return by_rows.normalise(x, norm, out)
    maps, results = x.permute(0, 3, 1, 2), out.permute(0, 3, 1, 2)
    weight, bias = norm_op.vector(norm.weight), norm_op.vector(norm.bias)
    group_norm_op.run(maps, norm.groups, weight, bias, norm.eps, None, False, results)
    return out


def _starred(hidden: torch.Tensor, star: StarReLU | None) -> torch.Tensor:
    """In place, in one rounding; `hidden` has been through a ReLU."""
    if star is None:
        return hidden
    bias, scale = star.bias.to(hidden.dtype), star.scale.item()
    return torch.addcmul(bias, hidden, hidden, value=scale, out=hidden)
