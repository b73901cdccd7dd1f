"""NaFlexViT: blocks of ViT and EVA on images of any size, packed without their padding."""

from vitfast import layers
from vitfast.families._family import Family, Gap

FAMILY = Family(
    name="naflex",
    models=("naflexvit",),
    sample="naflexvit_base_patch16_gap",
    layers=(layers.NaFlexVit,),
    gaps=(
        Gap(
            "timm.models.naflexvit.NaFlexEmbeds",
            "embeds patches and resizes position tables, once a model: not implemented yet",
        ),
    ),
)
