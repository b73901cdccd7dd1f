"""EdgeNeXt: ConvNeXt's block with kernels from 3 to 9, and attention over channels."""

from vitfast import layers
from vitfast.families._family import Family, Gap, blocks

_EDGENEXT = "timm.models.edgenext"
_CHANNELS = "attention over channels: not implemented yet"

FAMILY = Family(
    name="edgenext",
    models=("edgenext",),
    sample="edgenext_small",
    layers=(layers.EdgeNeXtConvBlock,),
    gaps=(
        *blocks(_EDGENEXT, "SplitTransposeBlock", reason=f"{_CHANNELS}; its parts are swapped"),
        Gap(f"{_EDGENEXT}.CrossCovarianceAttn", _CHANNELS, "attention"),
    ),
)
