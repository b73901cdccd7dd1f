"""Hiera: attention within mask units, then over all tokens."""

from vitfast import layers
from vitfast.families._family import Family

FAMILY = Family(
    name="hiera",
    models=("hiera",),
    sample="hiera_tiny_224",
    layers=(layers.HieraBlock, layers.HieraMaskUnitAttention),
)
