"""BEiT and BEiT v2."""

from vitfast import layers
from vitfast.families._family import Family

FAMILY = Family(
    name="beit",
    models=("beit",),
    sample="beit_base_patch16_224",
    layers=(layers.BeitBlock, layers.BeitAttention),
)
