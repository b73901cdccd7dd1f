"""The modules of tests/layers/test_sweep.py: every class that has a drop-in, in small."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm.layers as tl
import torch
from timm.models import (
    beit,
    convnext,
    davit,
    edgenext,
    eva,
    hiera,
    inception_next,
    maxxvit,
    metaformer,
    naflexvit,
    rdnet,
    resnet,
    resnetv2,
    swin_transformer,
    swin_transformer_v2,
    swin_transformer_v2_cr,
    vision_transformer_relpos,
)
from timm.models.vision_transformer import Block
from torch import nn

C, HEADS, N = 24, 2, 10
Case = tuple[Callable[[], nn.Module], Callable[[], tuple], dict[str, Any]]


def tokens(n: int = N) -> tuple:
    return (torch.randn(2, n, C),)


def rows(*size: int) -> tuple:
    return (torch.randn(2, *size, C),)


def planes(*size: int, channels: int = C) -> tuple:
    return (torch.randn(2, channels, *size).contiguous(memory_format=torch.channels_last),)


def rope(prefix: int = 1) -> dict[str, Any]:
    angles = torch.randn(N - prefix, C // HEADS // 2).repeat_interleave(2, -1)
    return {"rope": torch.cat([angles.sin(), angles.cos()], -1)}


def partition(kind: str, rel_pos: str, **options: Any) -> nn.Module:
    options = dict(rel_pos_type=rel_pos, rel_pos_dim=8) | options
    config = maxxvit.MaxxVitTransformerCfg(
        dim_head=12, window_size=(4, 3), grid_size=(4, 3), **options
    )
    return maxxvit.PartitionAttentionCl(C, kind, config, 0.3)


def maxvit_convnext(**options: Any) -> nn.Module:
    config = maxxvit.MaxxVitConvCfg(
        block_type="convnext", norm_layer="layernorm2d", act_layer="gelu", init_values=0.1
    )
    return maxxvit.ConvNeXtBlock(C, cfg=config, drop_path=0.3, **options)


def attention_cl() -> nn.Module:
    return partition("block", "bias").attn


def convnext_stage(width: int, wider: int) -> nn.Module:
    return convnext.ConvNeXtStage(
        width, wider, depth=2, drop_path_rates=[0.3, 0.3], ls_init_value=0.1,
        norm_layer=tl.LayerNorm2d, norm_layer_cl=tl.LayerNorm,
    )  # fmt: skip


def naflex() -> nn.Module:
    config = naflexvit.NaFlexVitCfg(
        patch_size=4, embed_dim=C, depth=2, num_heads=HEADS, init_values=0.1, reg_tokens=1,
        drop_path_rate=0.3, pos_embed_grid_size=(3, 3), fc_norm=False,
    )  # fmt: skip
    return naflexvit.NaFlexVit(config, num_classes=5)


def naflex_batch() -> tuple:
    """Two images, of 2 x 4 patches and of 2 x 3, padded to ten."""
    patches, coord = torch.zeros(2, 10, 4 * 4 * 3), torch.zeros(2, 10, 2, dtype=torch.long)
    valid = torch.zeros(2, 10, dtype=torch.bool)
    for i, (height, width) in enumerate(((2, 4), (2, 3))):
        n = height * width
        patches[i, :n] = torch.randn(n, 4 * 4 * 3)
        coord[i, :n] = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        valid[i, :n] = True
    return patches, coord, valid


def unfused(module: nn.Module) -> nn.Module:
    """A module whose attention computes in timm's plain steps."""
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    return module


def folded_stem() -> nn.Module:
    return timm_resnet(
        block=resnet.Bottleneck, layers=(1, 1), channels=(8, 12), stem_width=8, stem_type="deep",
        avg_down=True, features_only=True, out_indices=(-1,),
    )  # fmt: skip


def timm_resnet(**options: Any) -> nn.Module:
    from timm.models import build_model_with_cfg

    return build_model_with_cfg(resnet.ResNet, "test_sweep", False, **options)


group_norm = partial(tl.GroupNormAct, num_groups=4)
pre_norm = dict(conv_layer=partial(tl.StdConv2dSame, eps=1e-8), norm_layer=group_norm)
LAYER_NORM = dict(norm_layer=tl.LayerNorm)
SHIFTED = dict(input_resolution=(8, 12), window_size=4, shift_size=2, drop_path=0.3)
SWIN = swin_transformer.SwinTransformerBlock
SWIN_V2 = swin_transformer_v2.SwinTransformerV2Block
STAGE = dict(
    dim=C // 2, out_dim=C, input_resolution=(16, 24), depth=2, downsample=True, num_heads=HEADS,
    window_size=4,
)  # fmt: skip
SWIN_STAGE = swin_transformer.SwinTransformerStage
SWIN_V2_STAGE = swin_transformer_v2.SwinTransformerV2Stage
SWIN_CR = partial(swin_transformer_v2_cr.SwinTransformerV2CrBlock, C, HEADS, (8, 12), (4, 4))
ATTENDS = dict(
    token_mixer=partial(metaformer.Attention, head_dim=12, bias=True),
    norm_layer=metaformer.LayerNormNoBias,
    use_nchw=False,
    drop_path=0.3,
    res_scale_init_value=1.0,
)
CONVOLVES = dict(token_mixer=metaformer.SepConv, norm_layer=metaformer.LayerNorm2dNoBias)
EVA_BLOCK = partial(eva.EvaBlock, C, HEADS, drop_path=0.3)

# Name -> timm's module, its positional arguments and its keywords.
CASES: dict[str, Case] = {
    "norm": (lambda: tl.LayerNorm(C), tokens, {}),
    "torch norm": (lambda: nn.LayerNorm(C), tokens, {}),
    "rms norm": (lambda: tl.RmsNorm(C), tokens, {}),
    "norm 2d": (lambda: tl.LayerNorm2d(C), lambda: planes(5, 4), {}),
    "rms norm 2d": (lambda: tl.RmsNorm2d(C), lambda: planes(5, 4), {}),
    "grn": (lambda: tl.grn.GlobalResponseNorm(C), lambda: rows(5, 4), {}),
    "layer scale": (lambda: tl.LayerScale(C), tokens, {}),
    "mlp": (lambda: tl.Mlp(C, norm_layer=tl.LayerNorm, drop=0.2), tokens, {}),
    "glu mlp": (lambda: tl.GluMlp(C, 2 * C, norm_layer=tl.LayerNorm), tokens, {}),
    "swiglu": (lambda: tl.SwiGLU(C, 2 * C, norm_layer=tl.LayerNorm), tokens, {}),
    "grn mlp": (lambda: tl.GlobalResponseNormMlp(C), lambda: rows(5, 4), {}),
    "grn mlp conv": (
        lambda: tl.GlobalResponseNormMlp(C, use_conv=True),
        lambda: planes(5, 4),
        {},
    ),
    "patch embed": (
        lambda: tl.PatchEmbed(16, 4, 3, C, norm_layer=tl.LayerNorm),
        lambda: (torch.randn(2, 3, 16, 16),),
        {},
    ),
    "patch embed of any size": (
        lambda: tl.PatchEmbed(None, 4, 3, C, strict_img_size=False, output_fmt="NHWC"),
        lambda: (torch.randn(2, 3, 8, 20),),
        {},
    ),
    "stem": (
        lambda: nn.Sequential(nn.Conv2d(3, C, 4, 4), tl.LayerNorm2d(C)),
        lambda: planes(8, 12, channels=3),
        {},
    ),
    "downsampling": (
        lambda: nn.Sequential(tl.LayerNorm2d(C), nn.Conv2d(C, 32, 2, 2)),
        lambda: planes(6, 4),
        {},
    ),
    "attention": (
        lambda: tl.Attention(C, HEADS, qkv_bias=True, qk_norm=True, scale_norm=True, **LAYER_NORM),
        tokens,
        {},
    ),
    "attention rope": (
        lambda: tl.AttentionRope(C, HEADS, qkv_bias=True, qk_norm=True, **LAYER_NORM),
        tokens,
        rope(),
    ),
    "attention rope split": (
        lambda: tl.AttentionRope(C, HEADS, qkv_fused=False, rotate_half=True),
        tokens,
        rope(),
    ),
    "eva attention": (lambda: eva.EvaAttention(C, HEADS, scale_norm=False), tokens, rope()),
    "eva attention split": (
        lambda: eva.EvaAttention(C, HEADS, qkv_fused=False, **LAYER_NORM),
        tokens,
        rope(),
    ),
    "beit attention": (
        lambda: beit.Attention(C, HEADS, qkv_bias=True, window_size=(3, 3)),
        tokens,
        {},
    ),
    "relpos attention": (
        lambda: vision_transformer_relpos.RelPosAttention(
            C,
            HEADS,
            qkv_bias=True,
            rel_pos_cls=partial(tl.RelPosBias, window_size=(3, 3), prefix_tokens=1),
        ),
        tokens,
        {},
    ),
    "block": (
        lambda: Block(C, HEADS, qkv_bias=True, qk_norm=True, init_values=0.1, drop_path=0.3),
        tokens,
        {},
    ),
    "eva block": (lambda: EVA_BLOCK(init_values=0.1, swiglu_mlp=True), tokens, rope()),
    "eva block rope": (
        lambda: EVA_BLOCK(attn_type="rope", scale_mlp=True, norm_layer=tl.LayerNorm),
        tokens,
        rope(),
    ),
    "beit block": (
        lambda: beit.Block(
            C, HEADS, qkv_bias=True, init_values=0.1, window_size=(3, 3), drop_path=0.3
        ),
        tokens,
        {},
    ),
    "relpos block": (
        lambda: vision_transformer_relpos.RelPosBlock(
            C,
            HEADS,
            init_values=0.1,
            drop_path=0.3,
            rel_pos_cls=partial(tl.RelPosMlp, window_size=(3, 3), prefix_tokens=1, hidden_dim=8),
        ),
        tokens,
        {},
    ),
    "swin attention": (
        lambda: swin_transformer.WindowAttention(C, HEADS, window_size=(4, 4)),
        lambda: (torch.randn(3, 16, C),),
        {},
    ),
    "swin block": (lambda: SWIN(C, num_heads=HEADS, **SHIFTED), lambda: rows(8, 12), {}),
    "swin block unfused": (
        lambda: unfused(SWIN(C, num_heads=HEADS, **SHIFTED)),
        lambda: rows(8, 12),
        {},
    ),
    "swin block of any size": (
        lambda: SWIN(C, num_heads=HEADS, dynamic_mask=True, **SHIFTED),
        lambda: rows(9, 7),
        {},
    ),
    "swin merging": (lambda: swin_transformer.PatchMerging(C), lambda: rows(6, 4), {}),
    "swin v2 attention": (
        lambda: swin_transformer_v2.WindowAttention(C, (4, 4), HEADS),
        lambda: (torch.randn(3, 16, C),),
        {},
    ),
    "swin v2 block": (lambda: SWIN_V2(C, num_heads=HEADS, **SHIFTED), lambda: rows(8, 12), {}),
    "swin v2 block of any size": (
        lambda: SWIN_V2(C, num_heads=HEADS, dynamic_mask=True, **SHIFTED),
        lambda: rows(9, 7),
        {},
    ),
    "swin v2 merging": (lambda: swin_transformer_v2.PatchMerging(C), lambda: rows(6, 4), {}),
    "swin cr attention": (
        lambda: swin_transformer_v2_cr.WindowMultiHeadAttention(C, HEADS, (4, 4)),
        lambda: (torch.randn(3, 16, C),),
        {},
    ),
    "swin cr block": (
        lambda: SWIN_CR(shift_size=(2, 2), drop_path=0.3, extra_norm=True),
        lambda: rows(8, 12),
        {},
    ),
    "swin cr merging": (lambda: swin_transformer_v2_cr.PatchMerging(C), lambda: rows(6, 4), {}),
    "davit attention": (
        lambda: davit.WindowAttention(C, (4, 4), HEADS),
        lambda: (torch.randn(3, 16, C),),
        {},
    ),
    "davit block": (
        lambda: davit.SpatialBlock(C, HEADS, window_size=4, drop_path=0.3),
        lambda: planes(9, 8),
        {},
    ),
    "davit attention unfused": (
        lambda: unfused(davit.WindowAttention(C, (4, 4), HEADS)),
        lambda: (torch.randn(3, 16, C),),
        {},
    ),
    "maxvit attention unfused": (
        lambda: unfused(attention_cl()),
        lambda: (torch.randn(3, 4, 3, C),),
        {},
    ),
    "hiera attention unfused": (
        lambda: unfused(hiera.MaskUnitAttention(C, C, HEADS, 1, 4, True)),
        lambda: tokens(16),
        {},
    ),
    "maxvit attention": (attention_cl, lambda: (torch.randn(3, 4, 3, C),), {}),
    "maxvit block": (lambda: partition("block", "bias", init_values=0.1), lambda: rows(8, 6), {}),
    "maxvit grid": (lambda: partition("grid", "bias_tf", head_first=False), lambda: rows(8, 6), {}),
    "maxvit mlp": (lambda: partition("block", "mlp"), lambda: rows(8, 6), {}),
    "maxvit convnext": (maxvit_convnext, lambda: planes(5, 6), {}),
    "hiera attention": (
        lambda: hiera.MaskUnitAttention(C, C, HEADS, window_size=4, use_mask_unit_attn=True),
        lambda: tokens(16),
        {},
    ),
    "hiera block": (
        lambda: hiera.HieraBlock(
            C, C, HEADS, window_size=4, use_mask_unit_attn=True, init_values=0.1, drop_path=0.3
        ),
        lambda: tokens(16),
        {},
    ),
    "convnext": (
        lambda: convnext.ConvNeXtBlock(C, drop_path=0.3, ls_init_value=0.1),
        lambda: planes(5, 6),
        {},
    ),
    "convnext conv": (
        lambda: convnext.ConvNeXtBlock(C, conv_mlp=True, norm_layer=tl.LayerNorm2d),
        lambda: planes(5, 6),
        {},
    ),
    "convnext v2": (
        lambda: convnext.ConvNeXtBlock(C, use_grn=True, ls_init_value=None),
        lambda: planes(5, 6),
        {},
    ),
    "edgenext": (lambda: edgenext.ConvBlock(C, drop_path=0.3), lambda: planes(5, 6), {}),
    "rdnet": (
        lambda: rdnet.Block(C, 32, 16, norm_layer=tl.LayerNorm2d, act_layer=nn.GELU),
        lambda: planes(5, 6),
        {},
    ),
    "rdnet ese": (
        lambda: rdnet.BlockESE(C, 32, 16, norm_layer=tl.LayerNorm2d, act_layer=nn.GELU),
        lambda: planes(5, 6),
        {},
    ),
    "inception next": (
        lambda: inception_next.MetaNeXtBlock(C, drop_path=0.3),
        lambda: planes(5, 6),
        {},
    ),
    "metaformer attention": (
        lambda: metaformer.Attention(C, head_dim=12, bias=True, proj_bias=True),
        tokens,
        {},
    ),
    "metaformer attends": (lambda: metaformer.MetaFormerBlock(C, **ATTENDS), tokens, {}),
    "metaformer convolves": (
        lambda: metaformer.MetaFormerBlock(C, layer_scale_init_value=0.1, **CONVOLVES),
        lambda: planes(5, 6),
        {},
    ),
    "metaformer pools": (
        lambda: metaformer.MetaFormerBlock(C, norm_layer=tl.GroupNorm1),
        lambda: planes(5, 6),
        {},
    ),
    "metaformer downsampling": (
        lambda: metaformer.Downsampling(
            C, 32, 3, stride=2, padding=1, norm_layer=metaformer.LayerNorm2dNoBias
        ),
        lambda: planes(7, 6),
        {},
    ),
    "metaformer norm": (lambda: metaformer.LayerNormNoBias(C), tokens, {}),
    "metaformer norm 2d": (lambda: metaformer.LayerNorm2dNoBias(C), lambda: planes(5, 4), {}),
    "std conv": (lambda: tl.StdConv2d(C, 16, 3, padding=1), lambda: planes(5, 6), {}),
    "std conv same": (lambda: tl.StdConv2dSame(C, 16, 3, stride=2), lambda: planes(5, 6), {}),
    "group norm act": (lambda: group_norm(C), lambda: planes(5, 6), {}),
    "group norm 1 act": (lambda: tl.GroupNorm1Act(C), lambda: planes(5, 6), {}),
    "bottleneck": (
        lambda: resnetv2.Bottleneck(
            C, 32, proj_layer=resnetv2.DownsampleConv, drop_path_rate=0.3, **pre_norm
        ),
        lambda: planes(5, 6),
        {},
    ),
    "pre-act bottleneck": (
        lambda: resnetv2.PreActBottleneck(C, C, drop_path_rate=0.3, **pre_norm),
        lambda: planes(5, 6),
        {},
    ),
    "hybrid embed": (
        lambda: tl.HybridEmbed(
            nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU()), img_size=16, embed_dim=C
        ),
        lambda: (torch.randn(2, 3, 16, 16),),
        {},
    ),
    "folded stem": (
        lambda: tl.HybridEmbed(folded_stem(), img_size=(32, 32), embed_dim=C),
        lambda: (torch.randn(2, 3, 32, 32),),
        {},
    ),
    "swin stage": (
        lambda: SWIN_STAGE(drop_path=[0.3, 0.3], **STAGE),
        lambda: (torch.randn(2, 16, 24, C // 2),),
        {},
    ),
    "swin v2 stage": (
        lambda: SWIN_V2_STAGE(drop_path=[0.3, 0.3], **STAGE),
        lambda: (torch.randn(2, 16, 24, C // 2),),
        {},
    ),
    "convnext stage": (lambda: convnext_stage(C, 32), lambda: planes(6, 8), {}),
    "stages": (
        lambda: nn.Sequential(convnext_stage(C, 32), convnext_stage(32, 32)),
        lambda: planes(12, 8),
        {},
    ),
    "naflex": (naflex, naflex_batch, {}),
}
