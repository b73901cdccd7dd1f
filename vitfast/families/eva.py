"""EVA, EVA-02, DINOv3, Perception Encoder, ViTs with rotary embedding."""

from vitfast import layers
from vitfast.families._family import Family, blocks

FAMILY = Family(
    name="eva",
    models=("eva",),
    sample="eva02_tiny_patch14_224",
    layers=(layers.EvaBlock, layers.EvaAttention),
    gaps=blocks(
        "timm.models.eva",
        "EvaBlockPostNorm",
        reason="norms its branches instead of their input: timm's forward, on swapped parts",
    ),
)
