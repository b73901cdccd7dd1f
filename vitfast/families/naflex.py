"""NaFlexViT: blocks of ViT and EVA behind an embedding of images of any size."""

from vitfast.families._family import Family, Gap

FAMILY = Family(
    name="naflex",
    models=("naflexvit",),
    sample="naflexvit_base_patch16_gap",
    gaps=(
        Gap("timm.models.naflexvit.NaFlexEmbeds", "patches of mixed sizes: not implemented yet"),
    ),
)
