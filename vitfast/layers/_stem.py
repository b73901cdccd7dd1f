"""The backbone of a hybrid; its first convolution, norm and pooling fused in CPU inference."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.pool2d_same import MaxPool2dSame
from timm.models import resnetv2
from torch import nn

from vitfast.engine import resnet as engine
from vitfast.engine.products import conv as conv_product
from vitfast.engine.products.conv import same_pads
from vitfast.layers import _conv, _folded, _group_norm, _guard
from vitfast.ops.common import norm as norm_op
from vitfast.plans import Unfit


def features(backbone: Any, x: torch.Tensor) -> Any:
    """backbone(x) for images x [B, C, H, W], channels-last."""
    whole = type(backbone) is resnetv2.ResNetV2
    try:
        _guard.check_bare(backbone, "backbone")
        pooled = _pooled(x, backbone._modules["stem"] if whole else backbone)
    except Unfit:
        pooled = None
    if pooled is None:
        x = x.contiguous(memory_format=torch.channels_last)
        found = None if whole else _folded.features(backbone, x)
        return backbone(x) if found is None else found
    return backbone.head(backbone.norm(backbone.stages(pooled))) if whole else pooled


def _pooled(x: torch.Tensor, stem: Any) -> torch.Tensor | None:
    """pool(norm(conv(x))) where the norm ends in ReLU: zeros around its result are as good as the
    -inf that timm pads it with for the pooling. None where it takes the modules."""
    call = conv_product.direct(x)
    if call is None or x.numel() == 0 or x.dtype not in norm_op.DTYPES:
        return None
    if type(stem) is not nn.Sequential or list(stem._modules) != ["conv", "norm", "pool"]:
        return None
    _guard.check_bare(stem, "stem")
    children = stem._modules
    conv, norm = _conv.child(children, "conv"), _group_norm.child(children, "norm", "relu")
    pool: Any = children["pool"]
    _guard.check_bare(pool, "pool")
    if type(pool) is not MaxPool2dSame or pool.dilation != (1, 1) or pool.ceil_mode:
        return None
    ready = engine.fitting(call, conv, norm, x.shape[1]) if conv.same else None
    if ready is None:
        return None
    y = ready(x.to(call.dtype))
    room = same_pads(y.shape[2:], pool.kernel_size, pool.stride, pool.dilation)
    y = engine.normalise(y, norm, room if any(room) else None)
    return F.max_pool2d(y, pool.kernel_size, pool.stride)
