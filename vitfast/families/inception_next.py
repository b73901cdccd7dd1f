"""InceptionNeXt: an MLP of 1x1 convolutions behind a mixer and norm that are timm's."""

from vitfast import layers
from vitfast.families._family import Family

FAMILY = Family(
    name="inception_next",
    models=("inception_next",),
    sample="inception_next_tiny",
    layers=(layers.InceptionNeXtBlock,),
)
