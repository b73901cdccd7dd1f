"""Looking into models at high resolution, where no N x N matrix fits in memory."""

from vitfast.highres.attention_maps import AttentionMap, attention_map
from vitfast.highres.rollout import attention_rollout

__all__ = [
    "AttentionMap",
    "attention_map",
    "attention_rollout",
]
