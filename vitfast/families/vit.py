"""ViT, DeiT, MAE, DINOv2, CLIP, SigLIP; and the building blocks that other families share."""

from vitfast import layers
from vitfast.families._family import Family, Gap, attentions, blocks

_VIT = "timm.models.vision_transformer"
_POST_NORM = "norms its branches instead of their input: timm's forward, on swapped parts"

FAMILY = Family(
    name="vit",
    models=("vision_transformer", "deit"),
    sample="vit_base_patch16_224",
    layers=(
        layers.Sequential,
        layers.Block,
        layers.Attention,
        layers.AttentionRope,
        layers.Mlp,
        layers.GluMlp,
        layers.SwiGLU,
        layers.LayerNorm,
        layers.TorchLayerNorm,
        layers.RmsNorm,
        layers.LayerScale,
        layers.PatchEmbed,
    ),
    gaps=(
        *blocks(_VIT, "ResPostBlock", reason=_POST_NORM),
        *blocks(
            _VIT,
            "ParallelScalingBlock",
            "DiffParallelScalingBlock",
            reason="attention and MLP side by side: not implemented yet",
        ),
        *blocks(_VIT, "ParallelThingsBlock", reason="parallel branches: not implemented yet"),
        *attentions("timm.layers", "DiffAttention"),
        *attentions(
            "timm.layers",
            "AttentionPoolLatent",
            "AttentionPoolPrr",
            reason="pools all tokens into one, once a model: not implemented yet",
        ),
        Gap("timm.layers.PatchEmbedWithSize", "not implemented yet"),
        Gap("timm.layers.LayerNormFp32", "norms in float32 whatever comes: not implemented yet"),
        Gap("timm.layers.RmsNormFp32", "norms in float32 whatever comes: not implemented yet"),
        Gap("timm.layers.SimpleNorm", "not implemented yet"),
    ),
)
