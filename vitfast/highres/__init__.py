"""Images larger than a model takes.

features = vitfast.highres.tiled(model, "scan.tif", output="features", out="features.npy")
"""

from vitfast.highres.api import Region, TiledResult, tiled, tiled_regions
from vitfast.highres.streaming import FailedTile, TilingError
from vitfast.highres.tiling import Box

__all__ = [
    "Box",
    "FailedTile",
    "Region",
    "TiledResult",
    "TilingError",
    "tiled",
    "tiled_regions",
]
