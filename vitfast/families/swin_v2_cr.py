"""Swin Transformer V2 by Christoph Reich."""

from vitfast import layers
from vitfast.families._family import Family

FAMILY = Family(
    name="swin_v2_cr",
    models=("swin_transformer_v2_cr",),
    sample="swinv2_cr_tiny_224",
    layers=(
        layers.SwinTransformerV2CrBlock,
        layers.SwinV2CrWindowAttention,
        layers.SwinV2CrPatchMerging,
    ),
)
