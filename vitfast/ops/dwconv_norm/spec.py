"""Samples and cost of `dwconv_norm`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vitfast.ops.dwconv_norm.api import DISPATCHER, dwconv_norm
from vitfast.ops.dwconv_norm.reference import dwconv_norm as reference
from vitfast.ops.spec import Cost, OpSpec, Sample, randn, tensor_bytes


def _sample(
    name: str,
    *shape: int,
    kernel: tuple[int, int] = (7, 7),
    tags: Sequence[str] = ("odd",),
    norm: str | None = "layer",
    bias: bool = True,
    affine: bool = True,
    affine_dtype: torch.dtype | None = None,
    eps: float = 1e-6,
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **kwargs: Any,
) -> Sample:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = randn(g, *shape, dtype=dtype)
        if change is not None:
            x = change(x)
        c = x.shape[-1]
        weight = randn(g, c, 1, *kernel, dtype=dtype, scale=(kernel[0] * kernel[1]) ** -0.5)
        conv_bias = randn(g, c, dtype=dtype, scale=0.1) if bias else None
        norm_weight = norm_bias = None
        if affine and norm is not None:
            norm_weight = 1 + randn(g, c, dtype=affine_dtype or dtype, scale=0.1)
        if affine and norm == "layer":
            norm_bias = randn(g, c, dtype=affine_dtype or dtype, scale=0.1)
        return (x, weight, conv_bias, norm_weight, norm_bias, eps), {"norm": norm, **kwargs}

    return Sample(name, make, frozenset(tags))


def _outlier_channels(x: torch.Tensor) -> torch.Tensor:
    x[..., :2] *= 50
    return x


def _cost(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cost:
    x, weight = args[:2]
    taps = weight.shape[2] * weight.shape[3]
    dtype = kwargs.get("out_dtype") or x.dtype
    return Cost(
        flops=(2.0 * taps + (1.0 if kwargs["norm"] is None else 8.0)) * x.numel(),
        bytes=tensor_bytes(*args[:5]) + x.numel() * dtype.itemsize,
    )


SPEC = OpSpec(
    name="dwconv_norm",
    public=dwconv_norm,
    reference=reference,
    dispatcher=DISPATCHER,
    cost=_cost,
    samples=(
        _sample("convnext_tiny_stage0", 1, 56, 56, 96, tags=("real", "check")),
        _sample("convnext_tiny_stage1", 1, 28, 28, 192, tags=("real",)),
        _sample("convnext_tiny_stage2", 1, 14, 14, 384, tags=("real", "check")),
        _sample("convnext_tiny_stage3", 1, 7, 7, 768, tags=("real",)),
        _sample("convnext_base_stage2_b8", 8, 14, 14, 512, tags=("real",)),
        _sample("convnext_base_stage2_autocast", 4, 14, 14, 512, tags=("real",),
                affine_dtype=torch.float32),
        _sample("convnext_tiny_stage0_1024", 1, 256, 256, 96, tags=("real",)),
        _sample("convnextv2_atto_stage0", 2, 56, 56, 40, tags=("real",)),
        _sample("convnext_atto_rms_stage2", 2, 14, 14, 160, tags=("real",), norm="rms"),
        _sample("convnext_tiny_stage0_4k", 1, 540, 960, 96, tags=("real", "large")),
        _sample("odd_sizes", 2, 5, 4, 13, kernel=(3, 3), tags=("odd", "small", "check")),
        _sample("tall_kernel", 1, 4, 3, 5, kernel=(5, 3), tags=("odd", "small", "check"),
                norm="rms"),
        _sample("convolved", 2, 3, 4, 5, kernel=(3, 3), tags=("odd", "small", "check"), norm=None),
        _sample("no_affine", 1, 4, 3, 7, kernel=(3, 5), tags=("odd", "small"), affine=False,
                bias=False),
        _sample("kernel_7_over_odd_channels", 2, 11, 13, 23, tags=("odd", "check")),
        _sample("kernel_1", 2, 5, 6, 24, kernel=(1, 1)),
        _sample("kernel_5", 2, 9, 10, 40, kernel=(5, 5)),
        _sample("kernel_9", 1, 12, 10, 33, kernel=(9, 9)),
        _sample("kernel_11_in_a_line", 1, 6, 14, 32, kernel=(1, 11)),
        _sample("kernel_21_in_a_column", 1, 25, 4, 32, kernel=(21, 1)),
        _sample("kernel_31", 1, 33, 9, 17, kernel=(31, 31), norm=None),
        _sample("smaller_than_the_kernel", 3, 2, 3, 48),
        _sample("one_pixel", 4, 1, 1, 32),
        _sample("one_line", 2, 1, 19, 32),
        _sample("one_column", 2, 19, 1, 32),
        _sample("one_channel", 2, 7, 6, 1, norm=None),
        _sample("wide_rows", 1, 3, 3, 1030, kernel=(3, 3)),
        # The gradient of the taps is summed over parts of 96 or 256 pixels, the last a short one.
        *(
            _sample(f"pixels_{h * w}", 1, h, w, 9, kernel=(3, 3), tags=("odd", "tiles"))
            for h, w in ((5, 19), (8, 12), (1, 97), (15, 17), (16, 16), (1, 257), (27, 19))
        ),
        _sample("lines_of_several_tiles", 1, 3, 131, 17, kernel=(3, 3), norm=None,
                tags=("odd", "tiles")),
        _sample("normed_lines_of_several_tiles", 2, 2, 67, 8, kernel=(3, 3), tags=("odd", "tiles")),
        _sample("offset", 2, 6, 5, 24, kernel=(1, 1), change=lambda x: x + 1000),
        _sample("no_bias", 2, 6, 6, 48, bias=False),
        _sample("rms_of_7", 2, 8, 8, 64, norm="rms", eps=1e-5),
        _sample("convolved_7", 2, 9, 8, 50, norm=None),
        _sample("to_bfloat16", 2, 8, 9, 48, tags=("odd", "check"), out_dtype=torch.bfloat16),
        _sample("to_float32", 2, 8, 9, 48, out_dtype=torch.float32),
        _sample("convolved_to_bfloat16", 2, 8, 9, 48, norm=None, out_dtype=torch.bfloat16),
        _sample("float32_affine", 2, 8, 9, 48, affine_dtype=torch.float32),
        _sample("channels_first", 2, 9, 8, 40,
                change=lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1)),
        _sample("crossed", 2, 8, 9, 24, change=lambda x: x.transpose(1, 2)),
        _sample("cropped", 2, 12, 12, 24, change=lambda x: x[:, 1:9, 3:]),
        _sample("expanded", 1, 8, 9, 24, change=lambda x: x.expand(3, 8, 9, 24)),
        _sample("outlier_channels", 2, 8, 8, 96, change=_outlier_channels),
        _sample("empty", 0, 8, 8, 16, tags=("odd", "empty")),
        _sample("no_height", 2, 0, 8, 16, tags=("odd", "empty")),
    ),
)  # fmt: skip
