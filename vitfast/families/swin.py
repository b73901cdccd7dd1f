"""Swin Transformer."""

from vitfast import layers
from vitfast.families._family import Family

FAMILY = Family(
    name="swin",
    models=("swin_transformer",),
    sample="swin_tiny_patch4_window7_224",
    layers=(
        layers.SwinTransformerStage,
        layers.SwinTransformerBlock,
        layers.SwinWindowAttention,
        layers.SwinPatchMerging,
        layers.Sequential,
    ),
)
