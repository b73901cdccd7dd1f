"""MaxViT: attention within windows, and over a grid, between convolutions; CoAtNet."""

from vitfast import layers
from vitfast.families._family import Family, attentions, blocks

_MAXXVIT = "timm.models.maxxvit"
_NCHW = "linear layers as convolutions over NCHW: not implemented yet"

FAMILY = Family(
    name="maxvit",
    models=("maxxvit",),
    sample="maxvit_tiny_rw_224",
    layers=(
        layers.MaxxVitPartitionAttentionCl,
        layers.MaxxVitAttentionCl,
        layers.MaxxVitConvNeXtBlock,
    ),
    gaps=(
        *blocks(_MAXXVIT, "TransformerBlock2d", "PartitionAttention2d", reason=_NCHW),
        *blocks(
            _MAXXVIT,
            "ParallelPartitionAttention",
            reason="two attentions side by side: not implemented yet",
        ),
        *attentions(_MAXXVIT, "Attention2d", reason=_NCHW),
    ),
)
