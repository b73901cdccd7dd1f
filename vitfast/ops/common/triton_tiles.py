"""What Triton kernels over tiles of a map share: a program's tile, offsets, sums, launches.

A map is [B, n, C], n positions of C channels; `inner` is the stride of positions and `step` that of
channels, one of which is 1. A tile is ROWS positions by BLOCK channels of one image.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from vitfast.runtime.kernel_calls import next_power_of_2
from vitfast.runtime.launches import Arch, Launch

_ELEMENTS = 2048
"""Elements of a tile: 16 a thread of four warps. Chosen, not measured yet: no kernel spills with it
on any of the twelve architectures of tests/gpu/resources.json."""


@triton.jit
def tile_of(n: tl.tensor, c: tl.tensor, ROWS: tl.constexpr, BLOCK: tl.constexpr) -> Any:
    """This program's tile: image, positions, channels, which channels and which elements exist.

    The grid is B * cdiv(n, ROWS) * cdiv(c, BLOCK) programs, those of a position side by side.
    """
    blocks, tiles = tl.cdiv(c, BLOCK), tl.cdiv(n, ROWS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0) // blocks % tiles * ROWS + tl.arange(0, ROWS)
    b = (tl.program_id(0) // blocks // tiles).to(tl.int64)
    inside = column < c
    return b, row, column, inside, (row < n)[:, None] & inside[None, :]


@triton.jit
def part_of(n: tl.tensor, per: tl.tensor, c: tl.tensor, BLOCK: tl.constexpr) -> Any:
    """This program's part of an image, `per` positions: image, part, how many there are, channels.

    The grid is B * cdiv(n, per) * cdiv(c, BLOCK) programs, those of a part side by side.
    """
    blocks, parts = tl.cdiv(c, BLOCK), tl.cdiv(n, per)
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks % parts
    b = (tl.program_id(0) // blocks // parts).to(tl.int64)
    return b, part, parts, block * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def offsets(row: tl.tensor, column: tl.tensor, inner: tl.tensor, step: tl.tensor) -> Any:
    """Where a tile's elements are; 64 bits, since a tensor may hold more than 2^31 elements."""
    return row.to(tl.int64)[:, None] * inner + column.to(tl.int64)[None, :] * step


@triton.jit
def over_rows(tile: tl.tensor, ROWS: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr) -> Any:
    """[BLOCK]: sums over a tile's rows; of more than 32 in two steps, the second over LAST sums.

    One sum in order would lose accuracy.
    """
    if ROWS > 32:
        tile = tl.sum(tl.reshape(tile, [ROWS // LAST, LAST, BLOCK]), axis=0)
    return tl.sum(tile, axis=0)


def tile_heuristic(arch: Arch, key: dict[str, Any]) -> Launch:
    """A tile of 2K elements, the long side where memory is contiguous.

    128 positions of a planar map by 16 channels, or up to 128 channels by at most 128 positions:
    128 elements beside each other are 256 bytes in half precision, two lines of cache.
    """
    if key["planar"]:
        return Launch({"ROWS": 128, "BLOCK": _ELEMENTS // 128}, 4, 1)
    block = min(next_power_of_2(key["c"]), 128)
    return Launch({"ROWS": _ELEMENTS // max(block, 16), "BLOCK": block}, 4, 1)


def sums_heuristic(arch: Arch, key: dict[str, Any]) -> Launch:
    """The same tile; in half precision by eight warps, where a thread's 8 elements are 16 bytes.

    That is the widest load there is. Chosen, not measured yet.
    """
    half = arch.warp_size == 32 and key["dtype"] in ("float16", "bfloat16")
    return Launch(tile_heuristic(arch, key).blocks, 8 if half else 4, 1)
