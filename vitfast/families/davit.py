"""DaViT: attention over windows and over channels in turn."""

from vitfast import layers
from vitfast.families._family import Family, attentions, blocks

_DAVIT = "timm.models.davit"
_CHANNELS = "attention over channels: not implemented yet"

FAMILY = Family(
    name="davit",
    models=("davit",),
    sample="davit_tiny",
    layers=(layers.DavitSpatialBlock, layers.DavitWindowAttention),
    gaps=(
        *blocks(_DAVIT, "ChannelBlock", reason=_CHANNELS),
        *attentions(_DAVIT, "ChannelAttention", "ChannelAttentionV2", reason=_CHANNELS),
    ),
)
