"""Images larger than others take: in tiles, and where a model looks in them.

features = vitfast.highres.tiled(model, "scan.tif", output="features", out="features.npy")
found = vitfast.highres.attention_map(model, image, layer=-1, query="cls")
"""

from vitfast.highres.attention.attention_maps import AttentionMap, attention_map
from vitfast.highres.attention.rollout import attention_rollout
from vitfast.highres.tiles.api import Region, TiledResult, tiled, tiled_regions
from vitfast.highres.tiles.streaming import FailedTile, TilingError
from vitfast.highres.tiles.tiling import Box

__all__ = [
    "AttentionMap",
    "Box",
    "FailedTile",
    "Region",
    "TiledResult",
    "TilingError",
    "attention_map",
    "attention_rollout",
    "tiled",
    "tiled_regions",
]
