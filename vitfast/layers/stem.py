"""The backbone of a hybrid; its first convolution, norm and pooling fused in CPU inference."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.pool2d_same import MaxPool2dSame
from timm.models import _features, resnetv2
from torch import nn

from vitfast.engine import resnet as engine
from vitfast.engine.products import conv as conv_product
from vitfast.engine.products.conv import same_pads
from vitfast.layers.reading.batch_norm_stem import _CHAINS, _flat, _steps
from vitfast.layers.reading.children import check_bare
from vitfast.layers.reading.conv import read_std_conv
from vitfast.layers.reading.group_norm import read_group_norm
from vitfast.ops.common import norm as norm_op
from vitfast.plans import Conv, Unfit


def features(backbone: Any, x: torch.Tensor) -> Any:
    """backbone(x) for images x [B, C, H, W], channels-last."""
    whole = type(backbone) is resnetv2.ResNetV2
    try:
        check_bare(backbone, "backbone")
        pooled = _pooled(x, backbone._modules["stem"] if whole else backbone)
    except Unfit:
        pooled = None
    if pooled is None:
        x = x.contiguous(memory_format=torch.channels_last)
        found = None if whole else batch_norm_features(backbone, x)
        return backbone(x) if found is None else found
    return backbone.head(backbone.norm(backbone.stages(pooled))) if whole else pooled


def _pooled(x: torch.Tensor, stem: Any) -> torch.Tensor | None:
    """pool(norm(conv(x))) where the norm ends in ReLU: zeros around its result are as good as the
    -inf that timm pads it with for the pooling. None where it takes the modules."""
    kind = conv_product.direct(x)
    if kind is None or x.numel() == 0 or x.dtype not in norm_op.DTYPES:
        return None
    if type(stem) is not nn.Sequential or list(stem._modules) != ["conv", "norm", "pool"]:
        return None
    check_bare(stem, "stem")
    children = stem._modules
    conv, norm = read_std_conv(children, "conv"), read_group_norm(children, "norm", "relu")
    pool: Any = children["pool"]
    check_bare(pool, "pool")
    if type(pool) is not MaxPool2dSame or pool.dilation != (1, 1) or pool.ceil_mode:
        return None
    ready = engine.fitting(kind, conv, norm, x.shape[1]) if conv.same else None
    if ready is None:
        return None
    y = ready(x.to(kind.dtype))
    padding = same_pads(y.shape[2:], pool.kernel_size, pool.stride, pool.dilation)
    y = engine.normalise(y, norm, padding if any(padding) else None)
    return F.max_pool2d(y, pool.kernel_size, pool.stride)


def batch_norm_features(backbone: Any, x: torch.Tensor) -> torch.Tensor | None:
    """The last map of backbone(x), for channels-last images x [B, C, H, W].

    None where it is for the modules themselves.
    """
    kind = conv_product.direct(x)
    if kind is None or x.numel() == 0 or type(backbone) not in _CHAINS:
        return None
    if type(backbone) is _features.FeatureListNet and not (
        list(backbone.return_layers)[-1] == list(backbone._modules)[-1]
        and not backbone.grad_checkpointing
    ):
        return None
    try:
        steps = list(_steps(list(_flat(backbone))))
        if not any(type(step) is Conv for step in steps):
            return None
        for step in steps:
            x = engine.run_step(x, step, kind)
    except Unfit:
        return None
    return x
