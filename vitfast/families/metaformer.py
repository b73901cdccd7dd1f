"""MetaFormer: PoolFormer, ConvFormer and CAFormer."""

from vitfast import layers
from vitfast.families._family import Family

FAMILY = Family(
    name="metaformer",
    models=("metaformer",),
    sample="caformer_s18",
    layers=(
        layers.MetaFormerBlock,
        layers.MetaFormerAttention,
        layers.MetaFormerDownsampling,
        layers.MetaFormerLayerNormNoBias,
        layers.MetaFormerLayerNorm2dNoBias,
    ),
)
