"""What the drop-ins of windowed blocks share: a map's windows, and when timm has to run."""

from __future__ import annotations

from typing import Any

import torch

from vitfast.blocks.parts import attend
from vitfast.blocks.transformer import run_transformer_block
from vitfast.layers.reading.as_built import expect_attributes, expect_buffer
from vitfast.layers.reading.block import plan_with_norms_last, plan_without_layer_scale
from vitfast.plans import TransformerBlock, Windows


def attend_windows(module: Any, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """A drop-in's attention of windows x [windows, N, C]; None where it is for timm's forward."""
    plan = module._plan_call(x) if mask is None else None
    window = tuple(module.window_size)
    if plan is None or x.ndim != 3 or x.shape[1] != window[0] * window[1]:
        return None
    return attend(x, plan, windows=Windows(window, window))


def plan_norms_first(module: Any) -> TransformerBlock:
    """How a Swin block computes."""
    check_windows(module)
    return plan_without_layer_scale(module)


def plan_norms_last(module: Any) -> TransformerBlock:
    """How a Swin V2 block computes."""
    check_windows(module)
    return plan_with_norms_last(module)


def check_windows(module: Any) -> None:
    """That a block's windows and mask are what its sizes say."""
    window, shift = tuple(module.window_size), tuple(module.shift_size)
    expect_attributes(module, window_area=window[0] * window[1])
    expect_attributes(module.attn, window_size=module.window_size)
    if module.dynamic_mask:
        return
    size = [-(-n // w) * w for n, w in zip(_told(module), window, strict=True)]

    def mask(found: torch.Tensor) -> torch.Tensor | None:
        # timm's own, for a map that needs no padding; nothing reads its values.
        return module.get_attn_mask(found.new_zeros(()).expand(1, *size, 1))

    expect_buffer(module, "attn_mask", mask, window, shift, tuple(size))


def _told(module: Any) -> tuple[int, int]:
    """Rows and columns of the maps for which a block was built."""
    return tuple(module.feat_size if hasattr(module, "feat_size") else module.input_resolution)


def run_windowed_block(module: Any, x: torch.Tensor, attend: str = "_attn") -> torch.Tensor | None:
    """A drop-in block on a map x [B, H, W, C]; None where it is for timm's forward.

    attend: the name of timm's method for the attention of a map.
    """
    plan = module._recall_plan(x)
    if plan is None or x.ndim != 4:
        return None
    size = (x.shape[1], x.shape[2])
    # timm cuts its mask for the size it was told, and works with no other.
    if any(module.shift_size) and not module.dynamic_mask and size != _told(module):
        return None
    windows = Windows(size, tuple(module.window_size), tuple(module.shift_size))
    call = getattr(module, attend)
    out = run_transformer_block(
        x.flatten(1, 2), plan, module, call, maps=(size, None), windows=windows
    )
    return out.unflatten(1, size)
