"""Drop-ins for timm's LayerNorm and RmsNorm, over the last dimension and over NCHW's channels."""

from __future__ import annotations

import torch
from timm import layers as timm_layers
from timm.layers import grn

from vitfast import ops
from vitfast.blocks.parts import apply_norm, norm_2d_dtype
from vitfast.layers.base import Layer
from vitfast.layers.reading.norm import plan_grn, plan_norm, plan_norm_2d


class LayerNorm(Layer, timm_layers.LayerNorm):
    """`timm.layers.LayerNorm` on `vitfast.ops.layer_norm`."""

    ops = ("layer_norm",)
    plan = staticmethod(plan_norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._plan_call(x)
        return super().forward(x) if plan is None else apply_norm(x, plan)


class RmsNorm(Layer, timm_layers.RmsNorm):
    """`timm.layers.RmsNorm` on `vitfast.ops.rms_norm`."""

    ops = ("rms_norm",)
    plan = staticmethod(plan_norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._plan_call(x)
        return super().forward(x) if plan is None else apply_norm(x, plan)


class LayerNorm2d(Layer, timm_layers.LayerNorm2d):
    """`timm.layers.LayerNorm2d` on `vitfast.ops.layer_norm`; channels-last out, as timm's."""

    ops = ("layer_norm",)
    plan = staticmethod(plan_norm_2d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._plan_call(x)
        if plan is None or x.ndim != 4:
            return super().forward(x)
        return apply_norm(x.permute(0, 2, 3, 1), plan).permute(0, 3, 1, 2)


class RmsNorm2d(Layer, timm_layers.RmsNorm2d):
    """`timm.layers.RmsNorm2d` of channels-last maps on `vitfast.ops.rms_norm`.

    timm's result lies as its input does: other maps are left to it.
    """

    ops = ("rms_norm",)
    plan = staticmethod(plan_norm_2d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._plan_call(x)
        if plan is None or x.ndim != 4 or not x.permute(0, 2, 3, 1).is_contiguous():
            return super().forward(x)
        dtype = norm_2d_dtype(x.dtype, plan)
        return apply_norm(x.permute(0, 2, 3, 1), plan, dtype).permute(0, 3, 1, 2)


class GlobalResponseNorm(Layer, grn.GlobalResponseNorm):
    """`timm.layers.grn.GlobalResponseNorm` on `vitfast.ops.grn`."""

    ops = ("grn",)
    plan = staticmethod(plan_grn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._plan_call(x)
        if plan is None or x.ndim != 4:
            return super().forward(x)
        if self.channel_dim == -1:
            return ops.grn(x, *plan)
        return ops.grn(x.permute(0, 2, 3, 1), *plan).permute(0, 3, 1, 2)
