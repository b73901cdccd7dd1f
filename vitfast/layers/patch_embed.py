"""Drop-in for timm's PatchEmbed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm import layers as timm_layers
from timm.layers import Format

from vitfast import ops, plans
from vitfast.engine import patches as engine
from vitfast.engine.eligibility import plan_call, records_grad, takes_engine
from vitfast.layers.base import NORM, Layer
from vitfast.layers.reading.conv import plan_projection
from vitfast.layers.reading.norm import read_optional_norm


class PatchEmbed(Layer, timm_layers.PatchEmbed):
    """`timm.layers.PatchEmbed` on `vitfast.ops.patch_embed`. Tokens come out contiguous."""

    ops = ("patch_embed", *NORM)
    plan = staticmethod(plan_projection)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self._plan_call(x)
        if plan is None or not self._accepts(x):
            return super().forward(x)
        height, width = plan.weight.shape[-2:]
        if self.dynamic_img_pad:
            x = F.pad(x, (0, -x.shape[-1] % width, 0, -x.shape[-2] % height))
        rows, columns = x.shape[-2] // height, x.shape[-1] // width
        x = x[..., : rows * height, : columns * width]
        tokens = _normed(self, x, plan)
        if tokens is None:
            tokens = self.norm(ops.patch_embed(x, *plan))
        if not self.flatten and self.output_fmt == Format.NHWC:
            tokens = tokens.unflatten(1, (rows, columns))
        return tokens

    def _accepts(self, x: torch.Tensor) -> bool:
        """Whether the op gives what timm would; if not, timm's forward computes it or complains."""
        if x.ndim != 4 or not x.is_floating_point():
            return False
        if not self.flatten and self.output_fmt not in (Format.NHWC, Format.NLC):
            return False
        (height, width), (rows, columns) = x.shape[-2:], self.patch_size
        if self.img_size is None:
            return height >= rows and width >= columns
        if self.strict_img_size:
            return (height, width) == tuple(self.img_size)
        return self.dynamic_img_pad or height % rows == 0 == width % columns


def _normed(module: PatchEmbed, x: torch.Tensor, plan: plans.Projection) -> torch.Tensor | None:
    """Patches and their norm as one, in inference on the CPU; elsewhere None."""
    if x.numel() == 0 or not takes_engine(x, plan):
        return None
    norm = plan_call(lambda m: read_optional_norm(m._modules, "norm"), module, x)
    if norm is None or records_grad(norm):
        return None
    return engine.embed(x, *plan, norm)
