"""RDNet: ConvNeXt's convolution, norm and MLP on concatenated features."""

from vitfast import layers
from vitfast.families._family import Family

FAMILY = Family(
    name="rdnet",
    models=("rdnet",),
    sample="rdnet_tiny",
    layers=(layers.RDNetBlock, layers.RDNetBlockESE),
)
