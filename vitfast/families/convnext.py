"""ConvNeXt and ConvNeXt V2: depthwise convolution, norm and MLP."""

from vitfast import layers
from vitfast.families._family import Family

FAMILY = Family(
    name="convnext",
    models=("convnext",),
    sample="convnext_tiny",
    layers=(
        layers.ConvNeXtStage,
        layers.ConvNeXtBlock,
        layers.GlobalResponseNormMlp,
        layers.GlobalResponseNorm,
        layers.LayerNorm2d,
        layers.RmsNorm2d,
        layers.Sequential,
    ),
)
