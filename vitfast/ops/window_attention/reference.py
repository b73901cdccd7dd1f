"""Windowed attention in plain PyTorch: the definition.

Swin's (Liu et al. 2021, timm `SwinTransformerBlock._attn` around `WindowAttention`) and, by
cosine, Swin V2's (Liu et al. 2022, timm `swin_transformer_v2`): cyclic shift, padding to whole
windows, partition, softmax(scale * q k^T + bias + mask) v in each window, merge, crop, shift back.
MaxViT's windows may be a grid over the whole map (Tu et al. 2022, timm `maxxvit.grid_partition`).
Scores and softmax are float32 (float64 for float64); what enters the second matrix product has v's
dtype, and so have q and k of length 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

MASKED = -100.0
"""Added between tokens that only the cyclic shift brought together; timm's number."""
LARGEST_SCALE = math.log(100.0)
"""Of V2's learned scale, before the exponential."""
INPUTS = ("qkv", "table", "pad", "logit_scale")
"""Differentiable inputs, in the order of the outputs of `vitfast::window_attention_backward`."""


class Call(NamedTuple):
    """The arguments of `vitfast::window_attention` before `backend`, in the order of its schema.

    Args:
        wh, ww: rows and columns of a window.
        sh, sw: rows and columns that the map is rolled back by.
        save_stats: whether the statistics that the backward needs are returned as well, of
            `stats_shape`, float32 (float64 for float64).
        Others: as in `window_attention`.
    """

    qkv: torch.Tensor
    wh: int
    ww: int
    sh: int
    sw: int
    table: torch.Tensor | None
    pad: torch.Tensor | None
    logit_scale: torch.Tensor | None
    scale: float | None
    roll_first: bool
    grid: bool
    save_stats: bool

    @property
    def window(self) -> tuple[int, int]:
        """Rows and columns of a window."""
        return self.wh, self.ww

    @property
    def shift(self) -> tuple[int, int]:
        """Rows and columns that the map is rolled back by."""
        return self.sh, self.sw

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns of the map that whole windows fill."""
        high, wide = self.qkv.shape[1:3]
        return -(-high // self.wh) * self.wh, -(-wide // self.ww) * self.ww

    @property
    def stats_shape(self) -> tuple[int, ...]:
        """[2, B, windows, heads, N]: a shift and a sum for each query; [0] where not wanted."""
        if not self.save_stats:
            return (0,)
        batch, heads = self.qkv.shape[0], self.qkv.shape[4]
        windows = (self.padded[0] // self.wh) * (self.padded[1] // self.ww)
        return 2, batch, windows, heads, self.wh * self.ww


class BackwardCall(NamedTuple):
    """The arguments of `vitfast::window_attention_backward` before `backend`, in its order.

    Args:
        grad: [B, H, W, heads, D], qkv's dtype, any strides.
        stats: as the forward returned them; the last is negative where its backend leaves none.
        wanted: for each of `INPUTS`, whether its gradient is wanted; False where it is None.
        Others: as in `Call`.
    """

    grad: torch.Tensor
    stats: torch.Tensor
    qkv: torch.Tensor
    wh: int
    ww: int
    sh: int
    sw: int
    table: torch.Tensor | None
    pad: torch.Tensor | None
    logit_scale: torch.Tensor | None
    scale: float | None
    roll_first: bool
    grid: bool
    wanted: list[bool]

    @property
    def forward(self) -> Call:
        """The forward that this is the backward of."""
        return Call(
            self.qkv, self.wh, self.ww, self.sh, self.sw, self.table, self.pad, self.logit_scale,
            self.scale, self.roll_first, self.grid, save_stats=True,
        )  # fmt: skip


def window_attention(
    qkv: torch.Tensor,
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    table: torch.Tensor | None = None,
    pad: torch.Tensor | None = None,
    logit_scale: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    roll_first: bool = True,
    grid: bool = False,
) -> torch.Tensor:
    """Same arguments and result as `vitfast.ops.window_attention`; holds all scores at once."""
    batch, high, wide, _, heads, dim = qkv.shape
    call = Call(
        qkv, *window, *shift, table, pad, logit_scale, scale, roll_first, grid, save_stats=False
    )
    q, k, v = windowed(qkv, call, pad).transpose(3, 4).unbind(2)  # [B, windows, heads, N, D]

    wide_dtype = torch.promote_types(qkv.dtype, torch.float32)
    if logit_scale is not None:
        q, k = (unit(t, wide_dtype) for t in (q, k))
    factor = factors(logit_scale, heads, dim, scale, wide_dtype, qkv.device)
    scores = q.to(wide_dtype) @ k.to(wide_dtype).mT * factor[:, None, None]
    if table is not None:
        index = relative_index(window, qkv.device)
        scores = scores + table.to(wide_dtype)[index].permute(2, 0, 1)
    if any(shift):
        bands = band_map(call.padded, window, shift, qkv.device)
        bands = bands.view(1, *call.padded, 1, 1, 1)
        bands = partition(bands, window)[0, :, 0, :, 0, 0]  # [windows, N]
        hidden = bands[:, None, :, None] != bands[:, None, None, :]
        scores = scores + MASKED * hidden.to(wide_dtype)
    out = scores.softmax(-1).to(v.dtype) @ v

    out = merge(out, window, call.padded, grid)
    out = out if roll_first else out.roll(shift, (1, 2))
    out = out[:, :high, :wide]
    return (out.roll(shift, (1, 2)) if roll_first else out).contiguous()


def windowed(x: torch.Tensor, call: Call, pad: torch.Tensor | None) -> torch.Tensor:
    """x [B, H, W, parts, heads, D], shifted and padded as a call says, cut into windows.

    Args:
        pad: [parts, heads, D], the tokens that fill the map up; zeros by default.

    Returns:
        [B, windows, parts, N, heads, D].
    """
    back = tuple(-s for s in call.shift)
    if call.roll_first:
        x = _padded(x.roll(back, (1, 2)), call.padded, pad)
    else:
        x = _padded(x, call.padded, pad).roll(back, (1, 2))
    return partition(x, call.window, call.grid)


def _padded(x: torch.Tensor, size: tuple[int, int], pad: torch.Tensor | None) -> torch.Tensor:
    """More rows and columns at the bottom and right, every token of them `pad` (zeros)."""
    batch, high, wide = x.shape[:3]
    if (high, wide) == size:
        return x
    token = x.new_zeros(x.shape[3:]) if pad is None else pad.to(x.dtype)
    right = token.expand(batch, high, size[1] - wide, *token.shape)
    below = token.expand(batch, size[0] - high, size[1], *token.shape)
    return torch.cat([torch.cat([x, right], 2), below], 1)


def partition(x: torch.Tensor, window: tuple[int, int], grid: bool = False) -> torch.Tensor:
    """[B, H, W, 3, heads, D] to [B, windows, 3, N, heads, D]; H and W whole windows."""
    batch, high, wide, parts, heads, dim = x.shape
    h, w = window
    if grid:  # the same tokens side by side
        x = x.reshape(batch, h, high // h, w, wide // w, -1).permute(0, 2, 1, 4, 3, 5)
    x = x.reshape(batch, high // h, h, wide // w, w, parts, heads, dim)
    windows = (high // h) * (wide // w)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, windows, parts, h * w, heads, dim)


def merge(
    x: torch.Tensor, window: tuple[int, int], size: tuple[int, int], grid: bool = False
) -> torch.Tensor:
    """[B, windows, heads, N, D] to [B, H, W, heads, D]."""
    batch, _, heads, _, dim = x.shape
    (h, w), (high, wide) = window, size
    x = x.reshape(batch, high // h, wide // w, heads, h, w, dim)
    order = (0, 4, 1, 5, 2, 3, 6) if grid else (0, 1, 4, 2, 5, 3, 6)
    return x.permute(order).reshape(batch, high, wide, heads, dim)


def unit(x: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """The vectors of x made length 1, rounded to x's dtype."""
    return F.normalize(x.to(wide), dim=-1).to(x.dtype)


def factors(
    logit_scale: torch.Tensor | None, heads: int, dim: int, scale: float | None,
    dtype: torch.dtype, device: torch.device,
) -> torch.Tensor:  # fmt: skip
    """What each head's scores are multiplied by, [heads]."""
    if logit_scale is not None:
        return logit_scale.to(dtype).clamp(max=LARGEST_SCALE).exp()
    return torch.full((heads,), dim**-0.5 if scale is None else scale, dtype=dtype, device=device)


def relative_index(window: tuple[int, int], device: torch.device) -> torch.Tensor:
    """[N, N]: row of a table [(2 h - 1)(2 w - 1), heads] for a query and a key of a window."""
    h, w = window
    y, x = (t.flatten() for t in torch.meshgrid(
        torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij"
    ))  # fmt: skip
    return (y[:, None] - y + h - 1) * (2 * w - 1) + (x[:, None] - x + w - 1)


def band_map(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """[H, W]: number of the region that a token of the shifted map comes from."""

    def bands(length: int, w: int, s: int) -> torch.Tensor:
        at = torch.arange(length, device=device)
        return (at >= length - w).int() + (at >= length - s).int() if s else torch.zeros_like(at)

    rows, columns = map(bands, size, window, shift)
    return 3 * rows[:, None] + columns
