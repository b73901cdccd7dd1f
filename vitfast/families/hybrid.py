"""Hybrids: a convolutional stem in front of a plain ViT."""

from vitfast.families._family import Family, Gap

FAMILY = Family(
    name="hybrid",
    models=("vision_transformer_hybrid",),
    sample="vit_small_r26_s32_224",
    gaps=(
        Gap("timm.layers.HybridEmbed", "convolutional stem: not implemented yet"),
        Gap("timm.layers.HybridEmbedWithSize", "convolutional stem: not implemented yet"),
    ),
)
