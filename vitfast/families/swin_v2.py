"""Swin Transformer V2."""

from vitfast import layers
from vitfast.families._family import Family

FAMILY = Family(
    name="swin_v2",
    models=("swin_transformer_v2",),
    sample="swinv2_tiny_window8_256",
    layers=(
        layers.SwinTransformerV2Stage,
        layers.SwinTransformerV2Block,
        layers.SwinV2WindowAttention,
        layers.SwinV2PatchMerging,
        layers.Sequential,
    ),
)
