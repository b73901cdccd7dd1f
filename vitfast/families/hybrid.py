"""Hybrids: a convolutional stem in front of a plain ViT."""

from vitfast import layers
from vitfast.families._family import Family, Gap

_SCALED = "weights with a gain, of NFNets: not implemented yet"
_BATCH = "BatchNorm is folded into convolutions in inference on the CPU, else PyTorch's"

FAMILY = Family(
    name="hybrid",
    models=("vision_transformer_hybrid",),
    sample="vit_small_r26_s32_224",
    layers=(
        layers.HybridEmbed,
        layers.StdConv2d,
        layers.StdConv2dSame,
        layers.GroupNormAct,
        layers.GroupNorm1Act,
        layers.ResNetV2Bottleneck,
        layers.ResNetV2PreActBottleneck,
    ),
    gaps=(
        Gap("timm.layers.HybridEmbedWithSize", "not implemented yet"),
        *(
            Gap(f"timm.layers.{name}", _SCALED)
            for name in ("ScaledStdConv2d", "ScaledStdConv2dSame")
        ),
        Gap("timm.layers.BatchNormAct2d", _BATCH),
        Gap("timm.models.resnet.Bottleneck", _BATCH),
        Gap("timm.models.resnetv2.PreActBasic", "not implemented yet: its parts are swapped"),
    ),
)
