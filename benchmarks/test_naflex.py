"""A batch of images of eight sizes through NaFlexVit: timm, swapped blocks with padding masks, and
packed without padding."""

from __future__ import annotations

import copy
import functools

import pytest
import timm
import torch
from timm.models import naflexvit
from torch import nn

from vitfast import swap
from vitfast.bench.peers import Setting
from vitfast.ops.spec import Cost, tensor_bytes

NAME = "naflexvit_base_patch16_gap"
GRIDS = ((14, 14), (24, 24), (8, 8), (16, 20), (10, 10), (21, 21), (16, 16), (12, 12))
"""Rows and columns of patches; 2,097 in all, of 4,608 with padding."""
WAYS = ("eager", "masked", "packed")


def _batch(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tokens = max(rows * columns for rows, columns in GRIDS)
    lengths = torch.tensor([rows * columns for rows, columns in GRIDS])
    valid = torch.arange(tokens) < lengths[:, None]
    coord = torch.zeros(len(GRIDS), tokens, 2, dtype=torch.long)
    for i, (rows, columns) in enumerate(GRIDS):
        where = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        coord[i, : len(where)] = where
    patches = torch.randn(len(GRIDS), tokens, 16 * 16 * 3) * valid[..., None]
    return {"patches": patches.to(dtype), "patch_coord": coord, "patch_valid": valid}


@functools.lru_cache(maxsize=1)
def _made(dtype: torch.dtype, depth: int) -> tuple[dict[str, nn.Module], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    eager = timm.create_model(NAME, depth=depth).eval().to(dtype)
    masked, packed = copy.deepcopy(eager), copy.deepcopy(eager)
    for model in (masked, packed):
        swap(model)
    masked.__class__ = naflexvit.NaFlexVit  # timm's forward of swapped blocks
    return {"eager": eager, "masked": masked, "packed": packed}, _batch(dtype)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("dtype", "depth"),
    [
        (torch.float32, 2),
        pytest.param(torch.float32, 12, marks=pytest.mark.full_only),
        pytest.param(torch.bfloat16, 12, marks=pytest.mark.full_only),
    ],
)
def test_naflex(timed, way: str, dtype: torch.dtype, depth: int) -> None:
    models, batch = _made(dtype, depth)
    model = models[way]
    tokens, pairs = (sum((r * c + 4) ** power for r, c in GRIDS) for power in (1, 2))
    width = model.embed_dim
    flops = depth * (24.0 * tokens * width**2 + 4.0 * pairs * width)
    cost = Cost(flops, tensor_bytes(*model.parameters(), batch["patches"]))

    def call() -> torch.Tensor:
        with torch.no_grad():
            return model(batch)

    with torch.no_grad():
        torch.testing.assert_close(call(), models["eager"](batch), rtol=0.05, atol=0.05)
    timed(f"{NAME}, {depth} blocks, {dtype}", call, cost, Setting(dtype, "cpu"), None)
