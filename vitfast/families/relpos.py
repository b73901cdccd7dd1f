"""ViTs with a relative position bias."""

from vitfast import layers
from vitfast.families._family import Family, blocks

FAMILY = Family(
    name="relpos",
    models=("vision_transformer_relpos",),
    sample="vit_relpos_small_patch16_224",
    layers=(layers.RelPosBlock, layers.RelPosAttention),
    gaps=blocks(
        "timm.models.vision_transformer_relpos",
        "ResPostRelPosBlock",
        reason="norms its branches instead of their input: timm's forward, on swapped parts",
    ),
)
